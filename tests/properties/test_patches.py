"""The contract over drawn shapes, budgets, dtypes, batch sizes and methods of a ViT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from families import run
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import Vit, budgets, methods, options, vits

import tokenprune
from tokenprune import BudgetError, UnsupportedMethod
from tokenprune.schedule import kept_count

BATCHES = st.integers(1, 4)


@given(vits(), methods(), st.sampled_from(["keep", "flops"]), BATCHES)
def test_a_budget_of_one_is_the_model_itself(vit: Vit, method: str, kind: str, batch: int) -> None:
    model, x = vit.build(), vit.images(batch)
    plain = run(model, x)
    tokenprune.patch(model, method, **{kind: 1.0})
    assert torch.equal(run(model, x), plain)
    assert tokenprune.report(model).to_dict()["flops_ratio"] == 1.0
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)


@given(st.data(), vits(), methods(), BATCHES)
def test_a_budget_is_met_or_refused_with_what_is_possible(
    data: st.DataObject, vit: Vit, method: str, batch: int
) -> None:
    """A patched output is of the same shape, dtype and device, counts are what was asked, and unpatching leaves the
    model as it was; what cannot be met is an error, behind which the model is as it was too."""
    budget, chosen = data.draw(budgets(vit)), data.draw(options(method))
    model, x = vit.build(), vit.images(batch)
    before = dict(vars(model)), list(model.state_dict())
    plain = run(model, x)
    try:
        tokenprune.patch(model, method, **budget, **chosen)
    except (BudgetError, UnsupportedMethod) as error:
        note(str(error))
    else:
        reduced = run(model, x)
        assert (reduced.shape, reduced.dtype, reduced.device) == (plain.shape, plain.dtype, plain.device)
        assert reduced.isfinite().all() == plain.isfinite().all()
        assert torch.equal(run(model, x), reduced)
        as_asked(vit, budget, tokenprune.report(model).to_dict())
        features = model.forward_features(x)
        assert features.shape[1] == vit.tokens + vit.registers + vit.class_token
        tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    assert (dict(vars(model)), list(model.state_dict())) == before


def as_asked(vit: Vit, budget: dict[str, Any], report: dict[str, Any]) -> None:
    ((kind, value),) = budget.items()
    leaving = [place["tokens_out"] for place in report["places"]]
    assert all(isinstance(count, int) and 0 < count <= vit.tokens for count in leaving)
    if kind == "flops":
        assert abs(report["flops_ratio"] - value) <= 0.01
    elif kind == "tokens":
        assert (leaving or [vit.tokens])[-1] == value
    elif kind == "keep":
        assert (leaving or [vit.tokens])[-1] == max(1, math.ceil(value * vit.tokens - 1e-6))


@given(st.floats(0.0, 1.0, exclude_min=True), st.integers(1, 300))
def test_as_many_tokens_are_kept_as_make_up_the_share(share: float, tokens: int) -> None:
    count = kept_count(share, tokens)
    assert 1 <= count <= tokens
    assert count >= share * tokens - 1e-6
    assert count == 1 or count - 1 < share * tokens


@pytest.mark.timeout(1800)  # of 500 examples, whose operations are counted one by one
@given(vits((torch.float32,)), st.sampled_from(["zero_tprune", "top_k", "evit", "tome"]), st.floats(0.3, 1.0))
def test_reported_flops_are_those_of_torchs_own_counter(vit: Vit, method: str, flops: float) -> None:
    model, x = vit.build(), vit.images(1)
    before = zoo.count(model, x).get_total_flops() / 2
    try:
        tokenprune.patch(model, method, flops=flops)
    except (BudgetError, UnsupportedMethod):
        return
    report = tokenprune.report(model).to_dict()
    after = zoo.count(model, x).get_total_flops() / 2
    assert report["flops_before"] == before
    assert report["flops_after"] == after


@given(st.integers(9, 14), st.integers(3, 5), st.sampled_from([1, 2]), st.floats(0.6, 0.8))
def test_scoring_is_paid_for_out_of_the_budget(side: int, depth: int, heads: int, flops: float) -> None:
    """Of so narrow a model with so many tokens, PageRank takes more than a budget may be missed by."""
    vit = Vit((side, side), depth, heads, 24, 0, True, "token", False, False, torch.float32)
    model, x = vit.build(), vit.images(1)
    whole = zoo.count(model, x).get_total_flops()
    left = {}
    for method in ("random", "zero_tprune"):
        tokenprune.patch(model, method, flops=flops, places=(0,))
        assert abs(zoo.count(model, x).get_total_flops() / whole - flops) <= 0.01
        left[method] = tokenprune.report(model).to_dict()["places"][-1]["tokens_out"]
        tokenprune.unpatch(model)
    assert left["zero_tprune"] < left["random"]
