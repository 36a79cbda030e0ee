"""Adaptive ToMe: merge the pairs that are similar enough, as many as each image has (after Bolya et al., "Token
Merging", ICLR 2023, with a threshold in the place of its r)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.matching import cosine_match
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import HalfOfEveryBlock
from tokenprune.selection.pairs import alternating, halves, merge_above


@dataclass(frozen=True)
class MergeSimilarEnough:
    """Merge pairs whose cosine reaches `threshold`, or that of their block in `thresholds` ((block, cosine), ...)."""

    threshold: float
    thresholds: tuple[tuple[int, float], ...] = ()

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
        first = record.num_prefix_tokens % 2
        a, b = alternating(record, first)
        if 0 in (a.shape[1], b.shape[1]):
            return keep_where(torch.ones_like(record.origin, dtype=torch.bool))
        similarity, match = self.matched(record)
        threshold = dict(self.thresholds).get(record.place, self.threshold)
        least = max(0, record.tokens - keep)
        return merge_above(similarity, match, a, b, similarity.new_full((len(similarity), 1), threshold), least)

    def matched(self, record: AttentionRecord) -> tuple[Tensor, Tensor]:
        """For every second token [B, M] the cosine of its key with the most similar one of the others, and which."""
        return cosine_match(*halves(record.metric, record.num_prefix_tokens % 2))


@register_method("adaptive_tome")
def adaptive_tome(
    *,
    rate: float = 1.0,
    threshold: float = 0.9,
    thresholds: Mapping[int | str, float] | None = None,
    proportional: bool = True,
    places: tuple[int, ...] | None = None,
) -> Method:
    """Merge the pairs of ToMe whose keys are similar enough, in every block, a number of its own in each image.

    threshold: the least cosine of a pair that is merged, this package's own choice; thresholds: {block: cosine}, where
    blocks differ, as `tokenprune.calibrate(model, images, "tome", flops=0.5)` finds them. proportional: as in tome.
    rate: the most that stay at a place as a share of those at the place before; 1.0 sets no bound.
    """
    table = {} if thresholds is None else dict(thresholds)
    try:
        each = tuple(sorted((int(block), float(cosine)) for block, cosine in table.items()))
    except (TypeError, ValueError) as error:
        raise UnsupportedMethod(f"thresholds is {{block: cosine}}, got {thresholds!r}; e.g. {{0: 0.95}}") from error
    return Method(
        name="adaptive_tome",
        paper="after Bolya et al., Token Merging, ICLR 2023",
        schedule=HalfOfEveryBlock(rate, places),
        select=MergeSimilarEnough(threshold, each),
        merges=True,
        proportional=proportional,
        adaptive=True,
        needs=frozenset({"keys"}),
    )
