"""PiToMe, ToFu and DiffRate against oracles written from the definitions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import naive_merges
import naive_vit
import pytest
import tiny_models
from compared import assert_same, assert_same_passages, clear_oracle, recorded

import tokenprune
from tokenprune.methods.diffrate import LearnedRates
from tokenprune.schedule import Layout

CLASS_TOKEN = ("class_token", "registers", "rotary")
FAST = ("class_token", "mean_pool_registers")
VARIANTS = [
    pytest.param(variant, marks=[] if variant in FAST else pytest.mark.full) for variant in tiny_models.VARIANTS
]
CASES: dict[str, tuple[naive_vit.Reduce, Mapping[int, float]]] = {
    "pitome": (naive_merges.pitome, {2: 0.7, 7: 0.6}),
    "tofu": (naive_merges.tofu, {2: 0.7, 5: 0.75, 6: 0.6, 10: 0.6}),
    "diffrate": (naive_merges.diffrate, {1: 0.7, 4: 0.7, 9: 0.5}),
}


@pytest.mark.parametrize("proportional", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(method: str, variant: str, proportional: bool) -> None:
    reduce, shares = CASES[method]
    model = tiny_models.build(variant)
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    run = {"proportional": proportional, "weighted_pool": True}
    x, oracle = clear_oracle(model, reduce, schedule, seeds=30, **run)
    tokenprune.patch(model, method, schedule=dict(shares), proportional=proportional)
    logits, passages = recorded(model, x)
    if method != "pitome" and variant not in CLASS_TOKEN:  # dropped patches are estimated for a mean over all
        assert_same_passages(passages, oracle)
    else:
        assert_same(logits, passages, oracle)


@pytest.mark.parametrize(
    ("method", "options"), [("pitome", {"margin": 0.2}), ("tofu", {"merge_from": 0.2})], ids=["margin", "merge_from"]
)
def test_options_are_those_of_the_oracle_and_change_something(method: str, options: dict[str, Any]) -> None:
    model, (reduce, shares) = tiny_models.build("class_token"), CASES[method]
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    x, oracle = clear_oracle(model, functools.partial(reduce, **options), schedule, seeds=30, proportional=True)
    tokenprune.patch(model, method, schedule=dict(shares), **options)
    logits, passages = recorded(model, x)
    assert_same(logits, passages, oracle)
    tokenprune.patch(model, method, schedule=dict(shares))
    assert recorded(model, x)[1] != passages


def test_tofu_merges_late_as_long_as_the_longest() -> None:
    """What the oracle says of one merge after another, where all places merge."""
    model = tiny_models.build("mean_pool")
    schedule = {block: naive_vit.leaving_share(0.8) for block in (6, 8)}
    x, oracle = clear_oracle(model, naive_merges.tofu, schedule, proportional=True, weighted_pool=True)
    tokenprune.patch(model, "tofu", schedule=dict.fromkeys((6, 8), 0.8))
    assert_same(*recorded(model, x), oracle)


def test_diffrate_leaves_what_is_published() -> None:
    layout = Layout(12, 1)
    assert LearnedRates().default(196, layout) == tuple(count - 1 for count in naive_merges.MERGED)
    entering = 196
    for block, (pruned, merged) in enumerate(zip(naive_merges.PRUNED, naive_merges.MERGED, strict=True)):
        removed = entering - (merged - 1)
        assert LearnedRates().drops(block, 12, removed) == entering - (pruned - 1)
        entering = merged - 1


def test_diffrates_published_schedule_in_a_model_of_35_patches() -> None:
    model = tiny_models.build("class_token")
    left = [max(1, round(35 * (count - 1) / 196)) for count in naive_merges.MERGED]
    schedule = {block: (lambda _, count=count: count) for block, count in enumerate(left)}
    x, oracle = clear_oracle(model, naive_merges.diffrate, schedule, proportional=True)
    tokenprune.patch(model, "diffrate")
    logits, passages = recorded(model, x)
    for image in oracle.passages:  # a block that removes nothing is no place
        for block in [block for block, count in enumerate(left) if count == ([35, *left])[block]]:
            del image[block]
    assert_same(logits, passages, oracle)


def test_diffrate_takes_other_schedules_and_budgets() -> None:
    model = tiny_models.build("class_token")
    tokenprune.patch(model, "diffrate", kept=([36, 30] + 10 * [20], [36, 26] + 10 * [11]))
    report = tokenprune.report(model).to_dict()
    assert [place["tokens_out"] for place in report["places"]] == [35, 25] + 10 * [10]
    for budget in ({"keep": 0.4}, {"tokens": 9}, {"flops": 0.7}):
        tokenprune.patch(model, "diffrate", **budget)
        left = [place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]]
        assert left == sorted(left, reverse=True)
        assert left[-1] < left[6] < 35
    for wrong in (([36, 30], [36]), ([36, 40], [36, 30]), ([], []), ([36, 30],)):
        with pytest.raises(tokenprune.BudgetError, match="two lists"):
            tokenprune.patch(model, "diffrate", kept=wrong)


def test_pitome_and_tofu_halve_at_most() -> None:
    model = tiny_models.build("class_token")
    for method in ("pitome", "tofu"):
        with pytest.raises(tokenprune.BudgetError, match="leaves at least"):
            tokenprune.patch(model, method, schedule={3: 0.4})
    with pytest.raises(tokenprune.TokenPruneError, match="margin"):
        tokenprune.patch(model, "pitome", margin=-1.0)
    with pytest.raises(tokenprune.TokenPruneError, match="merge_from"):
        tokenprune.patch(model, "tofu", merge_from=0.0)
