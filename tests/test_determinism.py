"""Promise 6: the same tokens for the same image whatever its batch mates; seeds; global generators are untouched."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, FIRST_METHODS, METHODS, build, full_but, images, options, run
from torch import Tensor, nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.registry import make_method

# Every family once, the methods in turn, and the methods that look at content on the usual one.
PAIRS = [(family, METHODS[i % len(METHODS)]) for i, family in enumerate(FAMILIES)]
PAIRS += [("class_token", method) for method in METHODS if ("class_token", method) not in PAIRS]


def sources(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Where each original patch went, [B, N0] for each place."""
    with tokenprune.record(model) as recording:
        run(model, x)
    return [place.source for place in recording.forwards[0].places]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_batch_mates_do_not_matter(family: str, method: str) -> None:
    model = tokenprune.patch(build(family), method, keep=0.5, **options(family, method))
    x = images(model, 5)
    together = sources(model, x)
    assert len(together) >= (1 if method == "pomt" else 2)
    assert equal(sources(model, x), together)
    for i in range(5):
        assert equal(sources(model, x[i : i + 1]), [source[i : i + 1] for source in together])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert equal(sources(model, x[order]), [source[order] for source in together])
    extreme = torch.cat([x[:2], 1000.0 * x[2:4], torch.zeros_like(x[:1])])
    assert equal([source[:2] for source in sources(model, extreme)], [source[:2] for source in together])
    if method not in ("random", "uniform"):
        assert any(not torch.equal(source[0], source[1]) for source in together)


@pytest.mark.parametrize("method", full_but(FIRST_METHODS, METHODS))
def test_another_patch_of_the_same_model_is_the_same(method: str) -> None:
    model = tokenprune.patch(build("class_token"), method, keep=0.5)
    x = images(model)
    first, output = sources(model, x), run(model, x)
    tokenprune.patch(tokenprune.unpatch(model), method, keep=0.5)
    assert equal(sources(model, x), first)
    assert torch.equal(run(model, x), output)


def test_random_takes_a_seed() -> None:
    model = build("class_token")
    x = images(model)

    def chosen(seed: int) -> list[Tensor]:
        return sources(tokenprune.patch(model, "random", keep=0.5, seed=seed), x)

    first = chosen(0)
    assert equal(chosen(0), first)
    assert equal(sources(tokenprune.patch(model, "random", keep=0.5), x), first)
    different = [chosen(seed) for seed in range(1, 5)]
    assert not any(equal(one, first) for one in different)
    kept = torch.stack([(source[0][0] >= 0).float() for source in [first, *different]])
    assert kept.std(0).gt(0).float().mean() > 0.7  # no token is the favourite of every seed


def test_random_chooses_every_token_about_as_often() -> None:
    count = torch.zeros(196)
    for seed in range(400):
        record = AttentionRecord(
            hidden=torch.zeros(1, 197, 1), origin=torch.arange(196)[None], num_prefix_tokens=1, place=3, depth=12,
            grid=(14, 14),
        )  # fmt: skip
        count[make_method("random", {"seed": seed}).reduce(record, 98).kept[0]] += 1
    assert count.sum() == 400 * 98
    assert (count - 200).abs().max() < 45  # a binomial of 400 and one half: 4.5 standard deviations


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002 - the global one is meant


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generators_are_untouched(method: str) -> None:
    model = build("class_token")
    x = images(model)
    before = states()
    tokenprune.patch(model, method, flops=0.7)
    run(model, x)
    model.forward_features(x)
    sources(model, x)
    tokenprune.report(model)
    tokenprune.unpatch(model)
    assert states() == before


@pytest.mark.parametrize("family", ["class_token", "map_pool"])
@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_alike_keep_the_same_tokens(family: str, method: str) -> None:
    """All tokens alike: a blank image, and no positions."""
    model = build(family)
    with torch.no_grad():
        if getattr(model, "pos_embed", None) is not None:
            model.pos_embed.zero_()
    x = torch.zeros_like(images(model, 3))
    tokenprune.patch(model, method, schedule={1: 0.5}, **options(family, method))
    (together,) = sources(model, x)
    assert torch.equal(together, together[:1].expand(3, -1))
    assert torch.equal(sources(model, x[:1])[0], together[:1])
    assert torch.equal(sources(model, x)[0], together)


@pytest.mark.parametrize("method", ["top_k", "evit", "zero_tprune", "tome"])
def test_exact_ties(method: str) -> None:
    """Tokens of which no one differs from another in a single bit: the order of the positions decides."""
    alike = torch.ones(2, 4, 17, 8)
    record = AttentionRecord(
        hidden=torch.ones(2, 17, 32), origin=torch.arange(16).expand(2, -1), num_prefix_tokens=1, place=1, depth=4,
        grid=(4, 4), scale=0.35, queries=alike, keys=alike,
    )  # fmt: skip
    reduction = make_method(method, {}).reduce(record, 10)
    expected = {
        "top_k": list(range(10)),
        "evit": list(range(9)),
        # The second half are the candidates of the similarity stage, and those alike go in order.
        "zero_tprune": [0, 1, 2, 3, 4, 5, 6, 7, 14, 15],
        # Behind one class token the odd positions are merged, the first six of them, each into the first even one.
        "tome": [13, 15, 0, 2, 4, 6, 8, 10, 12, 14],
    }
    assert reduction.kept.tolist() == [expected[method]] * 2
    if method == "tome":
        assert reduction.moved is not None
        assert reduction.target is not None
        assert reduction.moved.tolist() == [[1, 3, 5, 7, 9, 11]] * 2
        assert reduction.target.tolist() == [[2] * 6] * 2
