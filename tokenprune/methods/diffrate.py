"""DiffRate: prune and merge by rates that were learned once for each block (Chen et al., "DiffRate: Differentiable
Compression Rate for Efficient Vision Transformers", ICCV 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Layout
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import keep_all, ranked

Kept = tuple[tuple[int, ...], tuple[int, ...]]

# Tokens left by pruning and then by merging in each block, the class token among them.
DEIT_SMALL_2_9_GFLOPS: Kept = (
    (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
    (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
)


@dataclass(frozen=True)
class LearnedRates:
    """Rates of every block, as shares of the tokens; in a model of another depth those of the nearest relative depth.

    At other budgets all shares are raised to one power, which keeps where the method prunes and merges much.
    """

    option: ClassVar[str] = "kept"

    kept: Kept = DEIT_SMALL_2_9_GFLOPS

    def __post_init__(self) -> None:
        lists = self.kept if isinstance(self.kept, tuple) and len(self.kept) == 2 else ((), ())
        counts = [count for one in lists if isinstance(one, tuple) for count in one]
        whole = all(isinstance(count, int) for count in counts) and all(2 <= count <= counts[0] for count in counts)
        if not counts or 2 * len(lists[0]) != len(counts) or not whole:
            raise BudgetError(
                f"kept={self.kept!r} must be two lists, of the tokens that pruning and merging leave in each block, the"
                " class token counted, the first number that of all tokens; for example"
                f" kept={DEIT_SMALL_2_9_GFLOPS}"
            )

    def places(self, layout: Layout) -> tuple[int, ...]:
        return tuple(range(layout.depth))

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        power = strength / max(1e-9, 1.0 - strength)
        counts, left = [], tokens
        for block in range(layout.depth):
            share = self._left(self.kept[1], self._nearest(block, layout.depth))
            left = min(left, max(1, round(tokens * share**power)))
            counts.append(left)
        return tuple(counts)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self.counts(0.5, tokens, layout)

    def fewest(self, entering: int, layout: Layout) -> int:
        return 1

    def drops(self, block: int, depth: int, removed: int) -> int:
        """Of the tokens that a block removes, those that it prunes before it merges, by the published share."""
        place = self._nearest(block, depth)
        entering = self._left(self.kept[1], place - 1) if place else 1.0
        pruned = min(entering, self._left(self.kept[0], place))
        merged = min(pruned, self._left(self.kept[1], place))
        return round((entering - pruned) / (entering - merged) * removed) if merged < entering else 0

    def _nearest(self, block: int, depth: int) -> int:
        return round(block * (len(self.kept[0]) - 1) / max(1, depth - 1))

    def _left(self, counts: Sequence[int], block: int) -> float:
        return (min(counts[: block + 1]) - 1) / (counts[0] - 1)


@dataclass(frozen=True)
class PruneAndMerge:
    """Drop the tail of a ranking, then merge the tail of what is left into the most similar of those that stay."""

    rates: LearnedRates

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        assert scores is not None
        removed = record.tokens - keep
        if removed == 0:
            return keep_all(record)
        middle = record.tokens - self.rates.drops(record.place, record.depth, removed)
        order = ranked(scores)
        kept, moved = order[:, :keep].sort(dim=1).values, order[:, keep:middle]
        hidden = record.hidden[:, record.num_prefix_tokens :]
        similarity, match = cosine_match(gather(hidden, moved), gather(hidden, kept))
        return Reduction(kept, moved, match, average="equal", shares=similarity.clamp_min(0.0))


@register_method("diffrate")
def diffrate(*, kept: tuple[Sequence[int], Sequence[int]] | None = None, proportional: bool = True) -> Method:
    """Drop the tokens that the class token attends to least, then merge the least of the others into the most similar
    (cosine of hidden states) of those that stay, both as much as rates say that were learned for each block.

    A group is averaged with equal weights; in proportional attention a token counts for its size and for that of each
    token merged into it times their similarity (not below 0).

    kept: the tokens that pruning, and then merging, leave in each block, the class token counted, as published
    schedules are printed; None is the one of DeiT-S at 2.9 GFLOPs. They are taken as shares. Under other budgets what
    a block prunes of what it removes is theirs. proportional: add log(that count) to the attention logits. A mean over
    patches is taken over the full grid, on which dropped ones are estimated.
    """
    rates = LearnedRates() if kept is None else LearnedRates(_frozen(kept))  # type: ignore[arg-type]
    return Method(
        name="diffrate",
        paper="Chen et al., DiffRate, ICCV 2023",
        schedule=rates,
        score=attention_to_class,
        select=PruneAndMerge(rates),
        merges=True,
        drops=rates.drops,
        proportional=proportional,
        needs=frozenset({"queries", "keys"}),
    )


def _frozen(value: object) -> object:
    """Rows as tuples, anything else as it is."""
    return tuple(map(_frozen, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
