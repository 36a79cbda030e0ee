"""A thousand times patched, run and unpatched: nothing grows, and the model is what it was."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from families import build, images

import tokenprune

CYCLES = 1000
METHODS = ("tome", "zero_tprune", "top_k", "pitome", "ats", "saint")


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.full
def test_a_thousand_cycles() -> None:
    model = build("class_token")
    x = images(model)
    with torch.inference_mode():
        before, names = model(x), list(model.state_dict())
        held = {}
        for cycle in range(CYCLES):
            method = METHODS[cycle % len(METHODS)]
            tokenprune.patch(model, method, keep=0.5)
            model(x)
            tokenprune.report(model)
            tokenprune.unpatch(model)
            if cycle + 1 in (CYCLES // 4, CYCLES):
                held[cycle + 1] = resident()
        assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert held[CYCLES] < 1.01 * held[CYCLES // 4]
