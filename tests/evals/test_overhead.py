"""The profile of a patched forward sees what is put into each part."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import build, images
from torch import Tensor

import tokenprune
from tokenprune.evals.overhead import profile_overhead
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import make_method, register_method
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import keep_top_k

COSTS = {"score": 0.02, "select": 0.01, "reduce": 0.03}


class SlowReduction(Reduction):
    def __call__(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        time.sleep(COSTS["reduce"])
        return super().__call__(x, sizes)


def slow_score(record: Any) -> Tensor:
    time.sleep(COSTS["score"])
    return attention_to_class(record)


def slow_select(scores: Tensor | None, record: Any, keep: int) -> Reduction:
    time.sleep(COSTS["select"])
    return SlowReduction(keep_top_k(scores, record, keep).kept)


@register_method("slow")
def slow() -> Method:
    """Top-k that sleeps in each part."""
    return replace(make_method("top_k", {}), name="slow", score=slow_score, select=slow_select)


class SlowModel(torch.nn.Module):
    """A forward of 0.2 s, whatever the machine does."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        out: Tensor = self.model(x)
        time.sleep(max(0.0, 0.2 - time.perf_counter() + start))
        return out


def test_a_known_cost_comes_out() -> None:
    model = build("class_token")
    patched = tokenprune.patch(shared_copy(model), "slow", schedule={1: 0.7, 2: 0.7})
    found = profile_overhead(SlowModel(model), patched, images(model), rounds=5)
    for part, cost in COSTS.items():
        assert getattr(found, part) == pytest.approx(2 * cost / 0.2, rel=0.3)
    assert found.total.estimate == pytest.approx(2 * sum(COSTS.values()) / 0.2, rel=0.3)
    assert found.total.estimate == pytest.approx(found.score + found.select + found.reduce, rel=0.1)


@pytest.mark.parametrize("method", ["tome", "zero_tprune", "ats"])
def test_operators_inside_a_selection_are_scoring(method: str) -> None:
    model = build("class_token")
    patched = tokenprune.patch(shared_copy(model), method, keep=0.5)
    found = profile_overhead(model, patched, images(model), rounds=3)
    assert min(found.score, found.select, found.reduce) > 0


def test_an_unpatched_model_is_refused() -> None:
    model = build("class_token")
    with pytest.raises(tokenprune.TokenPruneError, match="not patched"):
        profile_overhead(model, model, images(model))
