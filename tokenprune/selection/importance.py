"""Zero-TPrune's stage: the tokens most similar to a more important one go, then the least important (Wang et al., CVPR
2024, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.attention_mass import MAX_ITERATIONS
from tokenprune.kernels.inputs import mean_over_heads
from tokenprune.kernels.pairwise import METRICS
from tokenprune.reduction import Reduction
from tokenprune.scores.pagerank import fuse_heads, passing_heads, weighted_pagerank
from tokenprune.selection.pairs import Partition, similar_to_important
from tokenprune.selection.top_k import keep_top_k

Rounds = int | float
"""PageRank iterations, or the change of a head's scores below which it has settled."""

Feature = Literal["key", "query", "value", "x_pre", "x"]
"""What tokens are compared by: the mean over heads of the attention's parts, or hidden states in front of the block
or behind it."""


@dataclass(frozen=True)
class ImportanceAndSimilarity:
    """One pruning stage, I' -> S -> I (section 3): order the tokens by one voting round, drop those most similar to a
    more important one, then the least important by the full PageRank."""

    iterations: Rounds | tuple[tuple[int, Rounds], ...] | None
    similarity: int | tuple[float, float]
    variance: tuple[float, float] | None
    class_start: bool
    feature: Feature = "key"
    metric: str = "cosine"
    partition: Partition = "sequential_u"
    fusion: Literal["rms", "mean"] = "rms"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"feature": get_args(Feature), "partition": get_args(Partition), "fusion": ("rms", "mean")}
        for name, allowed in {**choices, "metric": METRICS}.items():
            if getattr(self, name) not in allowed:
                raise UnsupportedMethod(f"{name}={getattr(self, name)!r} is none of {', '.join(allowed)}")
        by_block = isinstance(self.iterations, tuple) and all(isinstance(own, tuple) for own in self.iterations)
        counts = [n for _, n in self.iterations] if by_block else [self.iterations]  # type: ignore[union-attr]
        if not all(
            n is None or (_whole(n) and 1 <= n <= MAX_ITERATIONS) or (isinstance(n, float) and 0 < n < 1)
            for n in counts
        ):
            raise UnsupportedMethod(
                f"iterations are whole numbers from 1 to {MAX_ITERATIONS}, or a tolerance in (0, 1), got"
                f" {self.iterations!r}; for example iterations=30 or iterations=1e-3"
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
        return min(asked, removed, self._candidates(record))

    def _candidates(self, record: AttentionRecord) -> int:
        return record.tokens - 1 if self.partition == "none" else record.tokens // 2

    def features(self, record: AttentionRecord) -> Tensor:
        """What the prunable tokens are compared by, [B, n, D]."""
        prefix = record.num_prefix_tokens
        if self.feature == "x":
            return record.hidden[:, prefix:]
        if self.feature == "x_pre":
            return record.block_input[:, prefix:]
        if self.feature == "key":
            return record.metric
        return mean_over_heads((record.q if self.feature == "query" else record.v)[:, :, prefix:])

    def similar(self, importance: Tensor, record: AttentionRecord, remove: int) -> Tensor:
        """Positions [B, remove] of the tokens that the similarity stage takes."""
        features = self.features(record)
        return similar_to_important(
            importance, features, remove, record, metric=self.metric, partition=self.partition, seed=self.seed
        )

    def importance(self, record: AttentionRecord, iterations: Rounds | Sequence[int]) -> Tensor:
        """[B, n]: PageRank per head, filtered and fused; [len(iterations), B, n] for several counts."""
        scores = weighted_pagerank(record, iterations, class_start=self.class_start)
        scores = scores[..., record.num_prefix_tokens :]
        return fuse_heads(scores, passing_heads(scores, self.variance), self.fusion)

    def after_tower(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        """The stages of `__call__` by importance [B, n] found before, as they are in the last blocks."""
        assert scores is not None
        removed = record.tokens - keep
        share = self.similarity if isinstance(self.similarity, int) else round(self.similarity[1] * removed)
        gone = self.similar(scores, record, min(share, removed, self._candidates(record)))
        return keep_top_k(scores.scatter(1, gone, -1.0), record, keep)

    def importance_here(self, record: AttentionRecord) -> Tensor:
        """[B, n]: importance after as many iterations as this block has."""
        return self.importance(record, self.rounds(record.place, record.depth))

    def needs(self) -> frozenset[str]:
        """What must be captured."""
        more = {"value": "values", "x_pre": "block_input"}.get(self.feature)
        return frozenset({"queries", "keys", *([more] if more else [])})

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
        gone = self.similar(order, record, redundant)
        return keep_top_k(importance.scatter(1, gone, -1.0), record, keep)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(value: object) -> TypeGuard[tuple[float, float]]:
    return isinstance(value, Sequence) and len(value) == 2 and all(is_number(v) or v == math.inf for v in value)
