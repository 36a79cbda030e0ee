"""What a patched model does, brought into the form of an oracle's outcome and compared with it."""

from collections.abc import Callable, Mapping

import naive_vit
import tiny_models
import torch
from torch import Tensor, nn

import tokenprune

MARGIN = 2e-5  # relative: no decision of the oracle may be so close that rounding to float32 could turn it
TOLERANCE = 1e-4  # of the logits, relative to the largest

Passages = list[dict[int, naive_vit.Passage]]


def recorded(model: nn.Module, x: Tensor) -> tuple[Tensor, Passages]:
    """The logits of one forward, and for each image what the package recorded at each place."""
    with torch.no_grad(), tokenprune.record(model) as record:
        logits = model(x)
    passages: Passages = [{} for _ in range(len(x))]
    for place in record.forwards[-1].places:
        for image, kept, source in zip(passages, place.kept.tolist(), place.source.tolist(), strict=True):
            left = [patch for patch in kept if patch >= 0]  # a ragged batch is padded
            image[int(place.name.removeprefix("blocks."))] = naive_vit.Passage(left, source)
    return logits, passages


def assert_same_passage(ours: naive_vit.Passage, oracle: naive_vit.Passage) -> None:
    assert ours.source == oracle.source
    assert len(ours.kept) == len(oracle.kept)
    for mine, other in zip(ours.kept, oracle.kept, strict=True):
        assert other is None or mine == other


def assert_same_passages(passages: Passages, oracle: naive_vit.Outcome) -> None:
    for ours, theirs in zip(passages, oracle.passages, strict=True):
        assert set(ours) == set(theirs)
        for block, passage in theirs.items():
            assert_same_passage(ours[block], passage)


def assert_same(logits: Tensor, passages: Passages, oracle: naive_vit.Outcome) -> None:
    assert_same_passages(passages, oracle)
    scale = oracle.logits.abs().max().item()
    torch.testing.assert_close(logits.double(), oracle.logits, rtol=0, atol=TOLERANCE * scale)


def clear_oracle(
    model: nn.Module,
    reduce: naive_vit.Reduce,
    schedule: Mapping[int, Callable[[int], int]],
    *,
    seeds: int = 8,
    **run: bool,
) -> tuple[Tensor, naive_vit.Outcome]:
    """Images and the oracle's outcome on them: of the first seed whose decisions are all clear."""
    for seed in range(seeds):
        x = tiny_models.images(seed=seed)
        oracle = naive_vit.run(model, x, reduce, schedule, **run)
        if oracle.margin > MARGIN:
            return x, oracle
    raise AssertionError("every seed has a decision too close to compare in float32")
