"""Thresholds of ltmp as a training would have left them, and a training forward with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

import tokenprune
from tokenprune.family import active_patches
from tokenprune.finding import bare, find_models
from tokenprune.learned_parts import LearnedParts
from tokenprune.learning import Lesson
from tokenprune.patch import Patch
from tokenprune.registry import make_method
from tokenprune.towers import untrained


def parts(model: nn.Module, merge: Sequence[float], prune: Sequence[float]) -> LearnedParts:
    """Learned parts of `model` with these thresholds of its blocks."""
    tower, family = find_models(model)[0]
    with bare(tower, family):
        host = family.adapter.host(tower)  # type: ignore[attr-defined]
        found = untrained(host, family.adapter, make_method("ltmp", {}), {})
    given = {"merge": merge, "prune": prune}
    for name in found.tensors:
        block, kind = name.split(".")
        found.tensors[name].fill_(given[kind][int(block)])
    return found


def patch_of(model: nn.Module) -> Patch:
    return next(one for one in active_patches(model).values() if isinstance(one, Patch))


@contextmanager
def in_training(model: nn.Module, width: int = 1) -> Iterator[Lesson]:
    """Forwards of the patched model mask what they would drop; `counted` is 0.7 whatever is kept."""
    patch = patch_of(model)
    prefix = patch.num_prefix_tokens
    patch.lesson = Lesson(prefix + patch.tokens, patch.tokens, width, patch.depth, lambda _: 0.7)
    try:
        yield patch.lesson
    finally:
        patch.lesson = None


def left(model: nn.Module, x: torch.Tensor) -> list[list[list[int]]]:
    """Original patches behind each place, of each image, where tokens really leave."""
    with torch.no_grad(), tokenprune.record(model) as recording:
        model(x)
    places = recording.forwards[-1].places
    return [[[p for p in place.kept[i].tolist() if p >= 0] for place in places] for i in range(len(x))]
