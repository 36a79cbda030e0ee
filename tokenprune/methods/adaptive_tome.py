"""Adaptive ToMe: merge the pairs that are similar enough, as many as each image has (after Bolya et al., "Token
Merging", ICLR 2023, with a threshold in the place of its r)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import HalfOfEveryBlock
from tokenprune.selection.pairs import alternating_match, merge_above, surplus


def merge_similar_enough(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, threshold: float
) -> RaggedReduction:
    """Merge ToMe's pairs whose keys' cosine is at least `threshold`, and as many more that `keep` tokens stay."""
    first = record.num_prefix_tokens % 2
    if record.tokens == 1:
        return keep_where(torch.ones_like(record.origin, dtype=torch.bool))
    a, b, similarity, match = alternating_match(record.metric, record, first)
    bound = similarity.new_full((len(similarity), 1), threshold)
    return merge_above(similarity, match, a, b, bound, surplus(record, keep))


@register_method("adaptive_tome")
def adaptive_tome(
    *, rate: float = 1.0, threshold: float = 0.9, proportional: bool = True, places: tuple[int, ...] | None = None
) -> Method:
    """Merge the pairs of ToMe whose keys are similar enough, in every block, a number of its own in each image.

    threshold: the least cosine of a pair that is merged, this package's own choice; `tokenprune.calibrate(model,
    images, "tome", flops=0.5)` finds the one that meets a budget. proportional: as in tome. rate: the most that stay at
    a place as a share of those at the place before; 1.0 sets no bound. keep= and tokens= bound what the last leaves.
    """
    if not (is_number(threshold) and -1 < threshold <= 1):
        raise UnsupportedMethod(f"threshold is a cosine in (-1, 1], got {threshold!r}; for example threshold=0.9")
    return Method(
        name="adaptive_tome",
        paper="after Bolya et al., Token Merging, ICLR 2023",
        schedule=HalfOfEveryBlock(rate, places),
        select=partial(merge_similar_enough, threshold=threshold),
        merges=True,
        proportional=proportional,
        adaptive=True,
        padded=True,
        needs=frozenset({"keys"}),
    )
