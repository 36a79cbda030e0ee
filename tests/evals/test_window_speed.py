"""The measurement of windows: what it compares, on a model of a few tokens."""

from __future__ import annotations

import pytest
from windows_zoo import build, images

from tokenprune.evals.window_speed import compare


def test_a_row_for_each_budget() -> None:
    model = build()
    budgets = {"few": {"keep": 0.3}, "flops": {"flops": 0.7}}
    rows = compare(model, images(batch=1), budgets=budgets, rounds=20).rows
    assert [row["windows"] for row in rows] == list(budgets)
    assert rows[1]["flops"] == pytest.approx(0.7, abs=0.01)
    for row in rows:
        assert row["of_promise"] == pytest.approx(row["speedup"] * row["flops"])
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert type(model.layers[0].blocks[0]).__qualname__ == "SwinTransformerBlock"
