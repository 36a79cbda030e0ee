"""Zero-TPrune: weighted PageRank on the attention graph, and a similarity stage (Wang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.lvlm.recipe import AfterTower, mean_keys
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages
from tokenprune.scores.pagerank import fuse_heads, passing_heads, weighted_pagerank
from tokenprune.selection.pairs import similar_to_important
from tokenprune.selection.top_k import keep_top_k

_PAPER = "Wang et al., Zero-TPrune, CVPR 2024"

Rounds = int | float
"""PageRank iterations, or the change of a head's scores below which it has settled."""


@dataclass(frozen=True)
class ImportanceAndSimilarity:
    """One pruning stage, I' -> S -> I (section 3): order the tokens by one voting round, drop those most similar to a
    more important one, then the least important by the full PageRank."""

    iterations: Rounds | tuple[tuple[int, Rounds], ...] | None
    similarity: int | tuple[float, float]
    variance: tuple[float, float] | None
    class_start: bool

    def __post_init__(self) -> None:
        counts = [self.iterations] if not isinstance(self.iterations, tuple) else [n for _, n in self.iterations]
        if not all(n is None or (_whole(n) and n >= 1) or (isinstance(n, float) and 0 < n < 1) for n in counts):
            raise UnsupportedMethod(
                f"iterations are whole numbers of at least 1, or a tolerance in (0, 1), got {self.iterations!r}; for"
                " example iterations=30 or iterations=1e-3"
            )
        fixed = _whole(self.similarity) and self.similarity >= 0
        if not fixed and not (_pair(self.similarity) and all(0 <= share <= 1 for share in self.similarity)):
            raise UnsupportedMethod(
                "similarity is a number of tokens, or its share in [0, 1] of those removed at the first block and from"
                f" three quarters of the depth on, got {self.similarity!r}; for example similarity=(1.0, 0.75)"
            )
        if self.variance is not None and not (_pair(self.variance) and self.variance[0] <= self.variance[1]):
            raise UnsupportedMethod(
                f"variance is the lower and the upper bound, got {self.variance!r}; for example variance=(0.01, 0.7)"
            )

    def rounds(self, place: int, depth: int) -> Rounds:
        """PageRank iterations (or the tolerance) at a block: 30 in the first quarter, 1 in the last and 5 between
        (section 4.1 for 12 blocks: the first and the last three)."""
        if isinstance(self.iterations, (int, float)):
            return self.iterations
        outside = [block for block, _ in self.iterations or () if not 0 <= block < depth]
        if outside:
            raise UnsupportedMethod(f"iterations names block {outside[0]!r}; the model has blocks 0 to {depth - 1}")
        edge = max(1, depth // 4)
        published = 30 if place < edge else 1 if place >= depth - edge else 5
        return dict(self.iterations or ()).get(place, published)

    def redundant(self, record: AttentionRecord, keep: int) -> int:
        """Tokens that the similarity stage takes of those to be removed; its candidates are half of the tokens."""
        removed = record.tokens - keep
        if isinstance(self.similarity, int):
            asked = self.similarity
        else:
            first, last = self.similarity
            depth = min(1.0, record.place / (0.75 * record.depth))
            asked = round((first + (last - first) * depth) * removed)
        return min(asked, removed, record.tokens // 2)

    def importance(self, record: AttentionRecord, iterations: Rounds | Sequence[int]) -> Tensor:
        """[B, n]: PageRank per head, filtered and fused; [len(iterations), B, n] for several counts."""
        scores = weighted_pagerank(record, iterations, class_start=self.class_start)
        scores = scores[..., record.num_prefix_tokens :]
        return fuse_heads(scores, passing_heads(scores, self.variance))

    def after_tower(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        """The stages of `__call__` by importance [B, n] found before, as they are in the last blocks."""
        assert scores is not None
        removed = record.tokens - keep
        share = self.similarity if isinstance(self.similarity, int) else round(self.similarity[1] * removed)
        gone = similar_to_important(scores, record.metric, min(share, removed, record.tokens // 2))
        return keep_top_k(scores.scatter(1, gone, -1.0), record, keep)

    def settled(self, record: AttentionRecord) -> Tensor:
        """[B, n]: importance at a place of its own, after as many iterations as the first blocks have."""
        return self.importance(record, self.rounds(0, record.depth))

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        if torch._C._get_tracing_state() is not None:
            raise UnsupportedMethod(
                "zero_tprune cannot be traced by torch.jit, where numbers of tokens are tensors; use torch.export, or"
                " torch.compile"
            )
        rounds = self.rounds(record.place, record.depth)
        redundant = self.redundant(record, keep)
        if redundant == 0:
            return keep_top_k(self.importance(record, rounds), record, keep)
        if redundant == record.tokens - keep or (isinstance(rounds, int) and rounds == 1):
            order = importance = self.importance(record, 1)  # nothing is left to the second stage, or it votes the same
        elif isinstance(rounds, int):
            order, importance = self.importance(record, (1, rounds))
        else:
            order, importance = self.importance(record, 1), self.importance(record, rounds)
        gone = similar_to_important(order, record.metric, redundant)
        return keep_top_k(importance.scatter(1, gone, -1.0), record, keep)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(value: object) -> TypeGuard[tuple[float, float]]:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)


@dataclass(frozen=True)
class EarlyBlocks(Stages):
    """Stages in every block of the first seven twelfths of the depth."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(max(1, round(layout.depth * 7 / 12))))


@register_method("zero_tprune")
def zero_tprune(
    *,
    rate: float = 0.9,
    places: tuple[int, ...] | None = None,
    iterations: Rounds | Mapping[int, Rounds] | None = None,
    similarity: int | tuple[float, float] = (1.0, 0.75),
    variance: tuple[float, float] | None = (0.01, 0.7),
    class_start: bool = True,
) -> Method:
    """Drop the tokens that matter least in a block's attention graph and those similar to better ones.

    The paper drops between blocks; dropping before the block's MLP, which works token by token, gives the same output
    for less.

    rate: share kept at each of `places`. iterations: of the PageRank, the same everywhere or {block: count} (the
    paper's by depth: 30, 5 and 1); a float such as 1e-3 goes on until a head's scores, which sum to one, change by less
    in all (at most 200 times, which is what a FLOPs budget counts; the host waits for the device after each).
    similarity: how many of the tokens removed at a place the similarity stage takes (all, where fewer are removed), or
    its share of them at the first block and from three quarters of the depth on. variance: bounds of the head filter,
    None for no filter. class_start: the class token starts with sqrt(N) times the weight of the others.

    Behind the tower of a vision-language model the graph is that of the layer whose output is used, the iterations are
    those of the first blocks, and the similarity stage's part is that of the last.

    The paper finds places, rates and the similarity stage's part by random search for each model, and prints them in
    part (10 tokens a stage in DeiT-S, with importance pruning growing with depth). The defaults here were found the
    same way on a DINOv2 and are the same for every model; `places=(1, 3, 6, 9), similarity=10` is near the print.
    """
    frozen = tuple(sorted(iterations.items())) if isinstance(iterations, Mapping) else iterations
    stage = ImportanceAndSimilarity(frozen, similarity, variance, class_start)
    return Method(
        name="zero_tprune" if class_start else "zero_tprune_uni",
        paper=_PAPER,
        schedule=EarlyBlocks(rate, places),
        select=stage,
        needs=frozenset({"queries", "keys"}),
        after_tower=AfterTower(stage.after_tower, score=stage.settled, keys=mean_keys),
    )


@register_method("zero_tprune_uni")
def zero_tprune_uni(
    *,
    rate: float = 0.9,
    places: tuple[int, ...] | None = None,
    iterations: Rounds | Mapping[int, Rounds] | None = None,
    similarity: int | tuple[float, float] = (1.0, 0.75),
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
