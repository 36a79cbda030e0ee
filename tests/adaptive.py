"""Two adaptive methods small enough to be checked against fixed ones, and what tests of them share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from families import FAMILIES
from torch import Tensor
from torch.nn import functional as F

from tokenprune import registry
from tokenprune.attention_record import AttentionRecord
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_to_class

# CaiT's class token comes in behind the blocks, and attends to every patch token.
RAGGED = [family for family in FAMILIES if family != "talking_heads"]


def above(scores: Tensor | None, record: AttentionRecord, keep: int, *, times: float) -> RaggedReduction:
    assert scores is not None
    return keep_where(scores * record.tokens >= times)


def similar(scores: Tensor | None, record: AttentionRecord, keep: int, *, cosine: float | None) -> RaggedReduction:
    """Each token of ToMe's side A goes to the most similar one of side B where they are similar enough."""
    metric = F.normalize(record.metric, dim=-1)
    positions = torch.arange(record.tokens, device=metric.device)
    side_a = (positions + record.num_prefix_tokens) % 2 == 0
    cosines = (metric @ metric.transpose(1, 2)).masked_fill(side_a, -2.0)
    best, partner = cosines.max(-1)
    enough = (best * side_a).sum(1, keepdim=True) / side_a.sum() if cosine is None else cosine
    return RaggedReduction(torch.where(side_a & (best >= enough), partner, positions))


def threshold(*, times: float = 1.0) -> Method:
    """Keep what the class token pays at least `times` the mean of the attention."""
    return Method(
        name="threshold",
        paper="a test",
        schedule=Stages(1.0),
        score=attention_to_class,
        select=partial(above, times=times),
        adaptive=True,
        needs=frozenset({"queries", "keys"}),
    )


def merge_threshold(*, cosine: float | None = None) -> Method:
    """Merge pairs whose keys are at least so similar (None: as the image's pairs are in the mean), with proportional
    attention."""
    return Method(
        name="merge_threshold",
        paper="a test",
        schedule=Stages(1.0),
        select=partial(similar, cosine=cosine),
        merges=True,
        proportional=True,
        adaptive=True,
        needs=frozenset({"keys"}),
    )


@contextmanager
def registered() -> Iterator[None]:
    """Both methods by name."""
    registry.register_method("threshold")(threshold)
    registry.register_method("merge_threshold")(merge_threshold)
    try:
        yield
    finally:
        registry._METHODS.pop("threshold")
        registry._METHODS.pop("merge_threshold")
