"""A patched model as ONNX: the same output in ONNX Runtime, for batches of any size."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from families import FAMILIES, METHODS, build, full_but, images
from torch import Tensor, nn

import tokenprune

# naflex's own forward branches on the values of its masks; exporting it unpatched fails as well.
EXPORTED = [family for family in FAMILIES if family != "naflex"]


def in_onnx_runtime(model: nn.Module, x: Tensor, others: list[Tensor], path: Path) -> list[Tensor]:
    """The outputs for `others` of the model exported with example x and a batch of any size."""
    batch = torch.export.Dim("batch", min=2, max=64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [torch.from_numpy(session.run(None, {name: one.numpy()})[0]) for one in others]


def check(model: nn.Module, path: Path) -> None:
    x, others = images(model), [images(model, 5, seed=1), images(model, 3, seed=2)]
    with torch.no_grad():
        wanted = [model(one) for one in others]
    for got, want in zip(in_onnx_runtime(model, x, others, path), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", full_but(("tome", "zero_tprune"), (*METHODS, "ltmp_fixed")))
def test_every_method_of_a_fixed_budget(method: str, tmp_path: Path) -> None:
    check(tokenprune.patch(build("class_token"), method, keep=0.5), tmp_path / "model.onnx")


@pytest.mark.full
@pytest.mark.parametrize("family", EXPORTED)
def test_every_family(family: str, tmp_path: Path) -> None:
    model = build(family)
    options = {"proportional": False} if family == "talking_heads" else {}
    check(tokenprune.patch(model, "tome", keep=0.5, **options), tmp_path / "model.onnx")


class Features(nn.Module):
    def __init__(self, **options: str) -> None:
        super().__init__()
        self.model = tokenprune.patch(build("rotary_registers"), "top_k", keep=0.5, **options)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(x)
        return features


@pytest.mark.parametrize("restore", full_but(("regression",), ("regression", "feature", "place", "fusion")))
def test_dense_features(restore: str, tmp_path: Path) -> None:
    features = Features(restore=restore)
    x = images(features.model)
    (got,) = in_onnx_runtime(features, x, [x], tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(got, features(x), atol=1e-4, rtol=1e-4)
