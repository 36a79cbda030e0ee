"""ALGM: merge alike windows early and alike pairs later, as many as each image has (Norouzi et al., "ALGM: Adaptive
Local-then-Global Token Merging for Efficient Semantic Segmentation with Plain Vision Transformers", CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages, alternate_tokens
from tokenprune.selection.pairs import alternating_match, merge_above, surplus
from tokenprune.selection.windows import pool_similar_windows


@dataclass(frozen=True)
class LocalThenGlobal(Stages):
    """The first block and the one behind a third of the depth (layers 1 and 5 of 12). A budget bounds what leaves the
    second and later ones: how many windows are alike is the image's own."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(sorted({0, layout.depth // 3}))

    def fewest(self, entering: int, layout: Layout) -> int:
        return alternate_tokens(entering, layout)

    def _at_rate(self, rate: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        later = super()._at_rate(rate, tokens, layout)
        return (tokens, *later[:-1])


@dataclass(frozen=True)
class MergeAlike:
    """Windows at the first place, pairs elsewhere."""

    threshold: float

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
        if record.place == record.first:
            return pool_similar_windows(record, self.threshold, max(0, record.tokens - keep))
        first, hidden = record.num_prefix_tokens % 2, record.hidden[:, record.num_prefix_tokens :]
        if record.tokens == 1:
            return keep_where(torch.ones_like(record.origin, dtype=torch.bool))
        a, b, similarity, match = alternating_match(hidden, record, first)
        threshold = similarity.mean(1, keepdim=True) + similarity.std(1, keepdim=True) / (record.place + 1)
        return merge_above(similarity, match, a, b, threshold, surplus(record, keep))


@register_method("algm")
def algm(*, rate: float = 1.0, threshold: float = 0.88, places: tuple[int, ...] | None = None) -> Method:
    """Pool windows of 2 x 2 alike tokens in the first block and merge alike pairs later, a number of its own in each
    image; alike is the cosine of hidden states.

    A window whose mean cosine is at least `threshold` becomes one token. Later every second token is merged into its
    most similar one of the others where that cosine is at least the mean of the image's, and a standard deviation over
    the number of the layer more. The published code takes the least number of the batch for both, and the batch's mean.

    places: the first is that of the windows. rate: the most that stay at a later place as a share of those before; 1.0,
    the paper's, sets no bound. keep= and tokens= bound what the last place leaves.
    """
    if not (is_number(threshold) and -1 < threshold <= 1):
        raise UnsupportedMethod(f"threshold is a cosine in (-1, 1], got {threshold!r}; the paper's is threshold=0.88")
    return Method(
        name="algm",
        paper="Norouzi et al., ALGM, CVPR 2024",
        schedule=LocalThenGlobal(rate, places),
        select=MergeAlike(threshold),
        merges=True,
        adaptive=True,
    )
