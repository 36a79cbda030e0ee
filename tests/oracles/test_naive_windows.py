"""The loops over windows are timm's Swin where no window is left out."""

from __future__ import annotations

import pytest
import torch
from naive_windows import run_swin
from windows_zoo import SIZES, build, images

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["v1", "v2"])
@pytest.mark.parametrize("size", SIZES)
def test_the_loops_are_the_host(name: str, size: tuple[int, int]) -> None:
    model = build(name, size).double()
    x = images(size, 1).double()
    tolerance = 1e-9 if name == "v1" else 1e-6  # coordinates of Swin v2 are worked out in float32
    whole = [[0.0] * len(stage.blocks) for stage in model.layers]
    with torch.no_grad():
        torch.testing.assert_close(run_swin(model, x, whole)[0], model(x), rtol=tolerance, atol=tolerance)
