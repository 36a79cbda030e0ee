"""ATS against an oracle written from the definition, on random models of 7 x 5 patches."""

from __future__ import annotations

import math

import naive_ats
import naive_vit
import pytest
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from torch import Tensor, nn

import tokenprune

PATCHES = tiny_models.PATCHES


def clear_ats(model: nn.Module, most: dict[int, int]) -> tuple[Tensor, naive_vit.Outcome]:
    """Images and the oracle's outcome on them, which takes many narrow decisions."""
    schedule = {block: (lambda _, count=count: count) for block, count in most.items()}
    return clear_oracle(model, naive_ats.ats, schedule, seeds=30, adaptive=True)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
@pytest.mark.parametrize("shares", [{2: 0.7, 5: 0.75, 10: 0.6}, {3: 1.0, 4: 1.0, 7: 0.4}], ids=["few", "all"])
def test_agrees_with_the_oracle(variant: str, shares: dict[int, float]) -> None:
    model, most, left = tiny_models.build(variant), {}, PATCHES
    for block, share in shares.items():
        most[block] = left = math.ceil(share * left)
    x, oracle = clear_ats(model, most)
    tokenprune.patch(model, "ats", schedule=shares)
    logits, passages = recorded(model, x)
    assert_same(logits, passages, oracle)
    counts = [len(image[block].kept) for image in passages for block in shares]
    assert len(set(counts)) > 3
    assert any(len(image[block].kept) < most[block] for image in passages for block in shares)


@pytest.mark.parametrize("variant", ["class_token", "rotary"])
def test_published_places_and_samples(variant: str) -> None:
    """As many samples as patches, in the blocks 3 to 11."""
    model = tiny_models.build(variant)
    x, oracle = clear_ats(model, dict.fromkeys(range(3, 12), PATCHES))
    tokenprune.patch(model, "ats")
    assert_same(*recorded(model, x), oracle)


def test_the_samples_of_the_last_place_follow_the_budget() -> None:
    model = tiny_models.build("class_token")
    for budget in ({"keep": 0.5}, {"tokens": 18}, {"rate": 18 / 35, "places": (4,)}):
        tokenprune.patch(model, "ats", **budget)
        places = tokenprune.report(model).to_dict()["places"]
        assert places[-1]["tokens_out"] == 18
        _, passages = recorded(model, tiny_models.images())
        assert all(len(passage.kept) <= 18 for image in passages for block, passage in image.items() if block == 11)


def test_a_place_takes_at_least_eight_samples() -> None:
    model = tiny_models.build("class_token")
    with pytest.raises(tokenprune.BudgetError, match="tokens=8"):
        tokenprune.patch(model, "ats", tokens=7)
    tokenprune.patch(model, "ats", rate=0.01)
    assert [place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]] == [8] * 9


def test_the_values_are_those_of_the_attention() -> None:
    """A token whose value is zero has no significance, however much attention it gets, and is not sampled."""
    model, x = tiny_models.build("class_token"), tiny_models.images()
    attention, inputs = model.blocks[3].attn, []
    tokenprune.patch(model, "ats", schedule={3: 1.0})
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    _, passages = recorded(model, x)
    patch = passages[0][3].kept[5]
    direction = inputs[0][0, 1 + patch]
    with torch.no_grad():
        attention.qkv.bias[-48:] = 0
        attention.qkv.weight[-48:] -= torch.outer(
            attention.qkv.weight[-48:] @ direction, direction / direction.dot(direction)
        )
    _, passages = recorded(model, x)
    assert patch not in passages[0][3].kept
