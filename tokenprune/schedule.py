"""Schedules: in which blocks a method reduces, and how strongly at each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from tokenprune.errors import BudgetError

# Guards a ceiling against the last bit of a product such as 0.7 * 10.
_EPS = 1e-6


def kept_count(share: float, tokens: int) -> int:
    """Tokens that a share in (0, 1] keeps of `tokens`: rounded up, at least one."""
    return max(1, math.ceil(share * tokens - _EPS))


@dataclass(frozen=True)
class Layout:
    """What a schedule knows of a model."""

    depth: int
    num_prefix_tokens: int = 1


class Schedule(Protocol):
    """Token counts of a method as one family, from keeping all (strength 0) to the most it can remove (1)."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        """Block indices, ascending, of the places where the method reduces in a model of that depth."""

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        """Prunable tokens leaving each place, non-increasing, for `tokens` entering the first."""

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        """The published setting."""

    def fewest(self, entering: int, layout: Layout) -> int:
        """The fewest tokens that can leave a place which `entering` tokens enter."""


@dataclass(frozen=True)
class Stages:
    """The same share `rate` kept at each of a few blocks, compounding (EViT, DynamicViT, "Which Tokens to Use?").

    at: block indices of the places; None for a quarter, a half and three quarters of the depth (3, 6 and 9 of 12).
    """

    rate: float = 0.7
    at: tuple[int, ...] | None = None
    smallest: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.rate <= 1.0:
            raise BudgetError(f"rate is the share kept at each place, in (0, 1], got {self.rate!r}")

    def places(self, layout: Layout) -> tuple[int, ...]:
        if self.at is not None:
            return checked_places(self.at, layout.depth)
        return tuple(sorted({min(layout.depth - 1, (layout.depth * quarter) // 4) for quarter in (1, 2, 3)}))

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self._at_rate(1.0 - strength, tokens, layout)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self._at_rate(self.rate, tokens, layout)

    def fewest(self, entering: int, layout: Layout) -> int:
        return min(self.smallest, entering)

    def _at_rate(self, rate: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        counts = []
        for _ in self.places(layout):
            tokens = max(self.fewest(tokens, layout), math.ceil(rate * tokens - _EPS))
            counts.append(tokens)
        return tuple(counts)


@dataclass(frozen=True)
class EveryBlock:
    """The same number r of tokens removed in every block (ToMe), spread evenly where r is not whole (9.4: 9 and 10).

    A block removes at most half of its tokens, as pairs are merged: at the strongest setting every block halves them.
    """

    r: int | None = None
    published: int = 8
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0):
            raise BudgetError(f"r is a whole number of tokens per block, got {self.r!r}; for example r=8")

    def places(self, layout: Layout) -> tuple[int, ...]:
        return tuple(range(layout.depth)) if self.at is None else checked_places(self.at, layout.depth)

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        removed, counts, left = strength * tokens / 2, [], tokens
        for i in range(len(self.places(layout))):
            left = min(left, max(self.fewest(left, layout), tokens - round(removed * (i + 1))))
            counts.append(left)
        return tuple(counts)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        r, counts, left = self.published if self.r is None else self.r, [], tokens
        for block in self.places(layout):
            if left - r < self.fewest(left, layout):
                raise BudgetError(
                    f"r={r} cannot be removed in block {block}: {left} tokens enter it and at most half can be merged;"
                    f" use r={max(1, tokens // (2 * layout.depth))} or a budget such as flops=0.6"
                )
            left -= r
            counts.append(left)
        return tuple(counts)

    def fewest(self, entering: int, layout: Layout) -> int:
        # Every second token of the sequence is a candidate; the one behind an odd prefix is not.
        return max(1, (entering + layout.num_prefix_tokens % 2) // 2)


def checked_places(at: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """`at` sorted and without repeats, negative indices counted from the end.

    Raises:
        BudgetError: an index outside the model.
    """
    wrong = [block for block in at if not -depth <= block < depth]
    if wrong:
        raise BudgetError(f"block {wrong[0]} does not exist: the model has blocks 0 to {depth - 1}")
    return tuple(sorted({block % depth for block in at}))
