"""SAINT: drop tokens with many near neighbours, as many as each image has (Jeddi et al., "Similarity-Aware Token
Pruning", 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count, is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.pairwise import neighbours as near_neighbours
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages
from tokenprune.selection.pairs import alternating, halves, surplus
from tokenprune.selection.top_k import first_of


@dataclass(frozen=True)
class FirstHalf(Stages):
    """Stages in every block of the first half of the depth, in which every second token may go."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(max(1, layout.depth // 2)))

    def fewest(self, entering: int, layout: Layout) -> int:
        return max(1, entering // 2)


@dataclass(frozen=True)
class DropNear:
    """Of every second token drop those with enough near neighbours among the others."""

    threshold: float
    neighbours: int
    gamma: float

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
        if record.tokens == 1:
            return keep_where(torch.ones_like(record.origin, dtype=torch.bool))
        candidates, _ = alternating(record, 0)
        count, near, every = self._near(record)
        score = torch.where(count > 0, count * (self.gamma * (near - self.threshold)).exp(), every)
        if record.alive is not None:
            there = record.alive[:, 0::2] > 0
            count, score = count * there, score.masked_fill(~there, float("-inf"))
        enough = (count >= self.neighbours).sum(1, keepdim=True).clamp_min(surplus(record, keep))
        kept = torch.ones_like(record.origin, dtype=torch.bool)
        return keep_where(kept.scatter(1, candidates, ~first_of(score, enough)))

    def _near(self, record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor]:
        """Of each candidate how many others are near, its mean cosine with those, and with all or what is
        proportional to it in an image; three of [B, M]."""
        candidates, others = halves(record.metric, 0)
        if record.alive is None:
            return near_neighbours(candidates, others, threshold=self.threshold)
        there = record.alive[:, 1::2]
        count, near, every = near_neighbours(candidates, others * there.unsqueeze(-1), threshold=self.threshold)
        if self.threshold <= 0:  # what is no token has a cosine of zero, and is near
            summed, count = near * count, count - (there == 0).sum(1, keepdim=True)
            near = summed / count.clamp_min(1)
        return count, near, every


@register_method("saint")
def saint(
    *,
    rate: float = 1.0,
    threshold: float = 0.75,
    neighbours: int = 5,
    gamma: float = 10.0,
    places: tuple[int, ...] | None = None,
) -> Method:
    """Drop redundant tokens in the first half of the depth, a number of its own in each image.

    Every second token is compared with the others by the cosine of keys. As many of them go as have `neighbours` or
    more within a cosine of `threshold`: those of the highest n exp(gamma (mean cosine with them - threshold)), where n
    is how many they are. The published code takes the mean of that number over the batch. Where the others are fewer
    than `neighbours`, as in small windows, none goes but by rate=, keep=, tokens= or schedule=.

    rate: the most that stay at a place as a share of those at the place before; 1.0, the paper's, sets no bound. keep=
    and tokens= bound what the last place leaves. places: blocks, all of the first half by default.
    """
    if not (is_number(threshold) and -1 < threshold < 1 and is_number(gamma) and gamma >= 0):
        raise UnsupportedMethod(
            f"threshold is a cosine in (-1, 1) and gamma 0 or more, got threshold={threshold!r}, gamma={gamma!r}; the"
            " paper's are threshold=0.75, gamma=10.0"
        )
    return Method(
        name="saint",
        paper="Jeddi et al., SAINT, 2025",
        schedule=FirstHalf(rate, places),
        select=DropNear(threshold, checked_count("neighbours", neighbours, smallest=1, example=5), gamma),
        adaptive=True,
        padded=True,
        needs=frozenset({"keys"}),
    )
