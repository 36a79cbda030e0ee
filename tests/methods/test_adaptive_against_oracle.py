"""SAINT and ALGM, which keep a number of tokens of its own in each image, against oracles written from the papers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import naive_adaptive
import naive_vit
import pytest
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from torch import nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.registry import make_method
from tokenprune.selection.windows import pool_similar_windows

FAST = ("class_token", "mean_pool_registers")
VARIANTS = [
    pytest.param(variant, marks=[] if variant in FAST else pytest.mark.full) for variant in tiny_models.VARIANTS
]
NEAR = {"threshold": 0.4, "neighbours": 3}  # the tokens of random models are not much alike
ALIKE = {"threshold": 0.7}
CASES: dict[str, tuple[Any, dict[str, Any], Mapping[int, int]]] = {
    "saint": (naive_adaptive.saint, NEAR, {1: 35, 3: 35, 5: 35}),
    "saint-gamma": (naive_adaptive.saint, {"threshold": 0.6, "neighbours": 4, "gamma": 0.0}, {0: 35, 1: 35}),
    "saint-bounded": (naive_adaptive.saint, NEAR, {1: 30, 3: 17}),
    "algm": (naive_adaptive.algm, {"threshold": 0.3}, {0: 35, 4: 35, 8: 35}),
    "adaptive_tome": (naive_adaptive.adaptive_tome, ALIKE, {1: 35, 3: 35, 5: 35}),
    "adaptive_tome-bounded": (naive_adaptive.adaptive_tome, ALIKE, {1: 30, 3: 17}),
    "algm-bounded": (naive_adaptive.algm, {"threshold": 0.3}, {0: 27, 4: 14}),
}


def oracle_of(model: nn.Module, name: str) -> tuple[torch.Tensor, naive_vit.Outcome]:
    reduce, options, most = CASES[name]
    schedule = {block: (lambda _, count=count: count) for block, count in most.items()}
    merges, proportional = not name.startswith("saint"), name.startswith("adaptive_tome")
    run = {"adaptive": True, "weighted_pool": merges, "proportional": proportional}
    return clear_oracle(model, functools.partial(reduce, **options), schedule, seeds=30, **run)


def patch(model: nn.Module, name: str) -> None:
    left, shares = 35, {}
    for block, count in CASES[name][2].items():
        shares[block], left = count / left, count
    tokenprune.patch(model, name.partition("-")[0], schedule=shares, **CASES[name][1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, name: str) -> None:
    model = tiny_models.build(variant)
    x, oracle = oracle_of(model, name)
    patch(model, name)
    logits, passages = recorded(model, x)
    assert_same(logits, passages, oracle)
    counts = [len(passage.kept) for image in passages for passage in image.values()]
    assert len(set(counts)) > 2 or "bounded" in name
    assert min(counts) < 35


@pytest.mark.parametrize("method", ["saint", "algm"])
def test_published_settings_run_and_a_budget_bounds_the_last_place(method: str) -> None:
    model = tiny_models.build("class_token")
    tokenprune.patch(model, method)
    blocks = {"saint": [0, 1, 2, 3, 4, 5], "algm": [0, 4]}[method]
    _, passages = recorded(model, tiny_models.images())
    assert sorted(passages[0]) == blocks
    for budget in ({"keep": 0.6}, {"tokens": 21}):
        tokenprune.patch(model, method, **budget)
        _, passages = recorded(model, tiny_models.images())
        assert all(len(image[blocks[-1]].kept) <= 21 for image in passages)


@pytest.mark.parametrize("method", ["saint", "algm"])
def test_an_image_of_one_colour_loses_the_most(method: str) -> None:
    """With equal tokens everything that may go goes, and the output is that of the whole."""
    model = tiny_models.build("class_token")
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:2].clone()
    x = tiny_models.images(2)
    x[0] = 0.3
    expected = recorded_plain(model, x)
    tokenprune.patch(model, method, places=(0,))
    logits, passages = recorded(model, x)
    assert len(passages[0][0].kept) == {"saint": 17, "algm": 35 - 3 * 6}[method]
    assert len(passages[1][0].kept) > len(passages[0][0].kept)
    assert logits[0].isfinite().all()
    assert not torch.equal(logits[1], expected[1]) or len(passages[1][0].kept) == 35


def test_algms_threshold_is_that_of_the_oracle_among_many_tokens() -> None:
    """200 tokens in three dimensions, of which some lie between the thresholds of one layer and the next."""
    hidden = torch.randn(1, 201, 3, generator=torch.Generator().manual_seed(0)).double()
    origin, found = torch.arange(200)[None], []
    for block in (1, 2, 3, 4):
        record = AttentionRecord(hidden, origin, 1, block, 12, None)
        target = make_method("algm", {}).reduce_ragged(record, 200).target[0]
        found.append([j for j in range(200) if target[j] == j])
        tokens = [naive_vit.Token(hidden[0, 1 + j], (j,), j) for j in range(200)]
        left = naive_adaptive.merge_alike(naive_vit.Place(block, tokens, 1, True, [], [], 200))
        assert [token.representative for token in left] == found[-1]
        assert [token.members for token in left] == [tuple((target == j).nonzero()[:, 0].tolist()) for j in found[-1]]
    assert len({len(left) for left in found}) == 4


def recorded_plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(x)
    return out


def test_algms_windows_are_at_the_first_place_however_it_is_counted() -> None:
    model, x = tiny_models.build("class_token"), tiny_models.images()
    found = []
    for places in ((1, 5), (1, -7), (-11, -7)):
        tokenprune.patch(model, "algm", threshold=0.3, places=places)
        found.append(recorded(model, x))
    for logits, _ in found[1:]:
        assert torch.equal(logits, found[0][0])


def test_what_is_refused() -> None:
    model = tiny_models.build("class_token")
    for options in ({"threshold": 1.5}, {"gamma": -1.0}, {"neighbours": 0}):
        with pytest.raises(tokenprune.TokenPruneError, match=next(iter(options))):
            tokenprune.patch(model, "saint", **options)
    with pytest.raises(tokenprune.TokenPruneError, match="threshold"):
        tokenprune.patch(model, "algm", threshold=2.0)
    hidden, origin = torch.randn(1, 10, 4), torch.arange(9)[None]
    record = AttentionRecord(hidden, origin, 1, 0, 12, (3, 3))
    with pytest.raises(tokenprune.BudgetError, match="leaves 6 of 9 at least"):
        pool_similar_windows(record, 0.9, 4)
    with pytest.raises(tokenprune.UnsupportedMethod, match="fill a grid"):
        pool_similar_windows(dataclasses.replace(record, grid=None), 0.9, 0)


def test_algms_windows_are_at_the_first_place_of_a_schedule_too() -> None:
    model, x = tiny_models.build("class_token"), tiny_models.images()
    tokenprune.patch(model, "algm", threshold=0.3, places=(1, 5))
    expected = recorded(model, x)
    for schedule in ({1: 1.0, 5: 1.0}, {"blocks.5": 1.0, -11: 1.0}):
        tokenprune.patch(model, "algm", threshold=0.3, schedule=schedule)
        logits, passages = recorded(model, x)
        assert torch.equal(logits, expected[0])
        assert passages == expected[1]
