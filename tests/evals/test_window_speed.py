"""The measurement of windows: what it compares, on a model of a few tokens."""

from __future__ import annotations

import pytest
from windows_zoo import build, images

from tokenprune.evals.window_speed import compare


def test_a_row_for_each_patch() -> None:
    model = build()
    patches = {"few": ("sparsevit", {"keep": 0.3}), "within": ("tome", {"flops": 0.8})}
    rows = compare(model, images(batch=1), patches=patches, rounds=20).rows
    assert [row["patch"] for row in rows] == list(patches)
    assert rows[1]["flops"] == pytest.approx(0.8, abs=0.01)
    for row in rows:
        assert row["of_promise"] == pytest.approx(row["speedup"] * row["flops"])
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert type(model.layers[0].blocks[0]).__qualname__ == "SwinTransformerBlock"
