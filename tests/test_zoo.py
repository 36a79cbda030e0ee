"""The zoo itself: every name of timm's plain-ViT modules runs shrunk, and its weights can tell a wrong model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import zoo

COUNTS = {  # timm 1.0.31
    "vision_transformer": 163,
    "deit": 16,
    "beit": 7,
    "eva": 65,
    "vision_transformer_hybrid": 14,
    "vision_transformer_relpos": 14,
    "cait": 10,
    "naflexvit": 14,
}


def test_counts(record_property: Callable[[str, object], None]) -> None:
    counts = Counter(zoo.module_of(name) for name in zoo.names())
    record_property("timm names", f"{dict(counts)}, {counts.total()} in all")
    if timm.__version__ == "1.0.31":
        assert counts == COUNTS
    else:
        assert counts.total() >= 200


@pytest.mark.parametrize("name", zoo.names())
def test_shrunk_model_runs(name: str) -> None:
    model = zoo.create(name)
    with torch.no_grad():
        first, second = model(zoo.inputs(model)).double()
    assert torch.isfinite(first).all()
    assert (first - second).norm() > 0.1 * first.norm(), "two images give nearly the same output"
