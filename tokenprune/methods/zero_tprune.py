"""Zero-TPrune: weighted PageRank on the attention graph, and a similarity stage (Wang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages
from tokenprune.scores.pagerank import fuse_heads, passing_heads, weighted_pagerank
from tokenprune.selection.pairs import similar_to_important
from tokenprune.selection.top_k import keep_top_k

_PAPER = "Wang et al., Zero-TPrune, CVPR 2024"


@dataclass(frozen=True)
class ImportanceAndSimilarity:
    """One pruning stage, I' -> S -> I (section 3): order the tokens by one voting round, drop those most similar to a
    more important one, then the least important by the full PageRank."""

    iterations: int | tuple[tuple[int, int], ...] | None
    similarity: int
    variance: tuple[float, float] | None
    class_start: bool

    def rounds(self, place: int, depth: int) -> int:
        """PageRank iterations at a block: 30 in the first quarter, 1 in the last and 5 between (section 4.1 for 12
        blocks: the first and the last three)."""
        if isinstance(self.iterations, int):
            return self.iterations
        edge = max(1, depth // 4)
        published = 30 if place < edge else 1 if place >= depth - edge else 5
        return dict(self.iterations or ()).get(place, published)

    def importance(self, record: AttentionRecord, iterations: int) -> Tensor:
        """[B, n]: PageRank per head, filtered and fused."""
        scores = weighted_pagerank(record, iterations, class_start=self.class_start)
        scores = scores[:, :, record.num_prefix_tokens :]
        return fuse_heads(scores, passing_heads(scores, self.variance))

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        iterations = self.rounds(record.place, record.depth)
        importance = self.importance(record, iterations)
        redundant = min(self.similarity, record.tokens - keep, record.tokens // 2)
        if redundant > 0:
            order = importance if iterations == 1 else self.importance(record, 1)
            gone = similar_to_important(order, record.metric, redundant)
            importance = torch.where(gone, -1.0, importance)
        return keep_top_k(importance, record, keep)


@dataclass(frozen=True)
class ZeroTPruneStages(Stages):
    """Stages behind blocks 1, 3, 6 and 9 of 12, at the same relative depth in other models."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        if self.at is not None:
            return super().places(layout)
        return tuple(sorted({round(layout.depth * block / 12) for block in (1, 3, 6, 9)}))


@register_method("zero_tprune")
def zero_tprune(
    *,
    rate: float = 0.8,
    places: tuple[int, ...] | None = None,
    iterations: int | Mapping[int, int] | None = None,
    similarity: int = 10,
    variance: tuple[float, float] | None = (0.01, 0.7),
    class_start: bool = True,
) -> Method:
    """Drop the tokens that matter least in a block's attention graph and those similar to better ones.

    The paper drops between blocks; dropping before the block's MLP, which works token by token, gives the same output
    for less.

    rate: share kept at each of `places`. iterations: of the PageRank, the same everywhere or {block: count} (the
    paper's by depth: 30, 5 and 1). similarity: tokens that the similarity stage takes of those removed at a place.
    variance: bounds of the head filter, None for no filter. class_start: the class token starts with sqrt(N) times
    the weight of the others. The paper searches its places and rates; what is printed of them is not complete, so the
    places are a choice here.
    """
    frozen = tuple(sorted(iterations.items())) if isinstance(iterations, Mapping) else iterations
    return Method(
        name="zero_tprune" if class_start else "zero_tprune_uni",
        paper=_PAPER,
        schedule=ZeroTPruneStages(rate, places),
        select=ImportanceAndSimilarity(frozen, similarity, variance, class_start),
        needs=frozenset({"queries", "keys"}),
    )


@register_method("zero_tprune_uni")
def zero_tprune_uni(
    *,
    rate: float = 0.8,
    places: tuple[int, ...] | None = None,
    iterations: int | Mapping[int, int] | None = None,
    similarity: int = 10,
    variance: tuple[float, float] | None = (0.01, 0.7),
) -> Method:
    """Zero-TPrune with a uniform start of the PageRank (section 4, "Zero-TPrune-uni"); options as there."""
    return zero_tprune(
        rate=rate,
        places=places,
        iterations=iterations,
        similarity=similarity,
        variance=variance,
        class_start=False,
    )
