"""The first methods against oracles written from the definitions, on random models of 7 x 5 patches.

The oracle runs in float64 and the package in float32. `compared.MARGIN` keeps the comparison exact.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import naive_methods
import naive_vit
import pytest
import tiny_models
import torch
from compared import TOLERANCE, assert_same, clear_oracle, recorded
from naive_zero_tprune import zero_tprune
from torch import Tensor

import tokenprune

DEEP = {2: 0.7, 5: 0.75, 10: 0.6}
ROUNDS = {2: 30, 5: 5, 10: 1}
NEVER = (0.0, math.inf)
CLASS_TOKEN_VARIANTS = ("class_token", "registers", "rotary")


@dataclass
class Case:
    """A method with its options, and the oracle that must agree with it."""

    method: str
    reduce: naive_vit.Reduce
    options: dict[str, Any] = field(default_factory=dict)
    run: dict[str, bool] = field(default_factory=dict)
    shares: Mapping[int, float] = field(default_factory=lambda: DEEP)
    variants: tuple[str, ...] = tuple(tiny_models.VARIANTS)


def tome_case(proportional: bool) -> Case:
    options = {} if proportional else {"proportional": False}
    return Case("tome", naive_methods.tome, options, {"proportional": proportional, "weighted_pool": True})


def zero_tprune_case(method: str = "zero_tprune", shares: Mapping[int, float] = DEEP, **options: Any) -> Case:
    reduce = functools.partial(zero_tprune, uniform_start=method == "zero_tprune_uni", **options)
    variants = CLASS_TOKEN_VARIANTS if method == "zero_tprune_uni" else tuple(tiny_models.VARIANTS)
    return Case(method, reduce, options, {"after_block": True}, shares, variants)


CASES = {
    "uniform": Case("uniform", naive_methods.uniform),
    "top_k": Case("top_k", naive_methods.top_k),
    # What rotary row a fused token has is the package's own choice.
    "evit": Case("evit", naive_methods.evit, variants=tuple(v for v in tiny_models.VARIANTS if v != "rotary")),
    "tome": tome_case(proportional=True),
    "tome-plain": tome_case(proportional=False),
    # The published 10 similar tokens leave importance little to decide among 35.
    "zero_tprune": zero_tprune_case(iterations=ROUNDS, similarity=10),
    "zero_tprune-published-rounds": zero_tprune_case(similarity=10, shares={1: 0.5, 6: 0.9, 11: 0.2}),
    "zero_tprune-importance": zero_tprune_case(iterations=ROUNDS, similarity=0),
    "zero_tprune-both": zero_tprune_case(iterations=ROUNDS, similarity=4),
    "zero_tprune-rounds": zero_tprune_case(iterations=7, similarity=2),
    "zero_tprune-no-filter": zero_tprune_case(iterations=ROUNDS, similarity=4, variance=NEVER),
    "zero_tprune-narrow-filter": zero_tprune_case(iterations=ROUNDS, similarity=4, variance=(0.1, 0.3)),
    "zero_tprune_uni": zero_tprune_case("zero_tprune_uni", iterations={2: 2, 5: 1, 10: 1}, similarity=4),
}


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, case in CASES.items() for variant in case.variants]
)
def test_agrees_with_the_oracle(name: str, variant: str) -> None:
    case, model = CASES[name], tiny_models.build(variant)
    schedule = {block: naive_vit.leaving_share(share) for block, share in case.shares.items()}
    x, oracle = clear_oracle(model, case.reduce, schedule, **case.run)
    tokenprune.patch(model, case.method, schedule=dict(case.shares), **case.options)
    assert_same(*recorded(model, x), oracle)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_tome_r_in_every_block(variant: str) -> None:
    model = tiny_models.build(variant)
    schedule = {block: naive_vit.leaving_less(2) for block in range(12)}
    x, oracle = clear_oracle(model, naive_methods.tome, schedule, proportional=True, weighted_pool=True)
    tokenprune.patch(model, "tome", r=2)
    assert_same(*recorded(model, x), oracle)


@pytest.mark.parametrize("variant", ["class_token", "mean_pool"])
def test_tome_of_twins_changes_nothing(variant: str) -> None:
    """With proportional attention (and a mean by size) one token of weight two is the same as two equal ones."""
    model, x = tiny_models.build_with_twins(variant)
    with torch.no_grad():
        expected = model(x)
    n, pairs = tiny_models.PATCHES, tiny_models.PATCHES // 2
    tokenprune.patch(model, "tome", schedule={2: (n - pairs) / n})
    logits, passages = recorded(model, x)
    for image in passages:
        assert len(image[2].kept) == n - pairs
        assert image[2].source[0:-1:2] == image[2].source[1::2]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_tome_cannot_merge_more_than_half(variant: str) -> None:
    """Of 35 tokens at most as many go as side A has: 18 where position 0 is in A, else 17."""
    model = tiny_models.build(variant)
    side_a = sum((j + model.num_prefix_tokens) % 2 == 0 for j in range(tiny_models.PATCHES))
    with pytest.raises(tokenprune.BudgetError):
        tokenprune.patch(model, "tome", schedule={2: (tiny_models.PATCHES - side_a - 1) / tiny_models.PATCHES})
    tokenprune.patch(model, "tome", schedule={2: (tiny_models.PATCHES - side_a) / tiny_models.PATCHES})
    _, passages = recorded(model, tiny_models.images())
    assert len(passages[0][2].kept) == tiny_models.PATCHES - side_a


def test_equal_scores_keep_the_lower_tokens() -> None:
    """Without queries every key gets the same attention, so order alone decides."""
    model, x = tiny_models.build("class_token"), tiny_models.images()
    with torch.no_grad():
        for parameter in model.blocks[2].attn.qkv.parameters():
            parameter[:48] = 0
    tokenprune.patch(model, "top_k", schedule={2: 0.6})
    _, passages = recorded(model, x)
    assert all(image[2].kept == list(range(21)) for image in passages)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_random_keeps_a_seeded_subset(variant: str) -> None:
    x = tiny_models.images()

    def kept(seed: int, x: Tensor = x) -> list[list[int | None]]:
        model = tiny_models.build(variant)
        tokenprune.patch(model, "random", schedule=dict(DEEP), seed=seed)
        _, passages = recorded(model, x)
        for image in passages:
            assert [len(image[block].kept) for block in DEEP] == [25, 19, 12]
            previous = range(tiny_models.PATCHES)
            for block in DEEP:
                patches = image[block].kept
                assert patches == sorted(set(patches) & set(previous))
                position = {patch: i for i, patch in enumerate(patches)}
                assert image[block].source == [position.get(patch, -1) for patch in range(tiny_models.PATCHES)]
                previous = patches
        return [image[block].kept for image in passages for block in DEEP]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = kept(seed=1)
    assert kept(seed=1) == first
    assert kept(seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)
    # The same tokens for the same image, alone or in another place of the batch.
    assert [patches for i in range(3) for patches in kept(1, x[i : i + 1])] == first
    flipped = kept(1, x.flip(0))
    assert flipped[6:] + flipped[3:6] + flipped[:3] == first


@pytest.mark.parametrize("method", ["uniform", "top_k", "evit", "tome", "zero_tprune"])
def test_a_second_forward_starts_afresh(method: str) -> None:
    model = tiny_models.build("registers")
    tokenprune.patch(model, method, schedule=dict(DEEP))
    first, second = tiny_models.images(seed=0), tiny_models.images(batch=2, seed=1)
    logits, passages = recorded(model, first)
    recorded(model, second)
    again, passages_again = recorded(model, first)
    assert torch.equal(logits, again)
    assert passages == passages_again
