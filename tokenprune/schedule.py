"""Schedules: in which blocks a method reduces, and how strongly at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from tokenprune.budget import checked_count, checked_share
from tokenprune.errors import BudgetError

# Guards a ceiling against the last bit of a product such as 0.7 * 10.
_EPS = 1e-6


def kept_count(share: float, tokens: int) -> int:
    """Tokens that a share in (0, 1] keeps of `tokens`: rounded up, at least one."""
    return max(1, math.ceil(share * tokens - _EPS))


def largest_share(tokens: int) -> float:
    """The largest share, in thousandths, that does not keep all of `tokens`."""
    return math.floor(1000 * (tokens - 1) / tokens) / 1000


@dataclass(frozen=True)
class Layout:
    """What a schedule knows of a model."""

    depth: int
    num_prefix_tokens: int = 1


class Schedule(Protocol):
    """Token counts of a method as one family, from keeping all (strength 0) to the most it can remove (1).

    option: name of the method's option that sets `default`. Given, it is a budget: no other may stand beside it.
    """

    @property
    def option(self) -> str:
        """See above."""

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

    option: ClassVar[str] = "rate"

    rate: float = 0.7
    at: tuple[int, ...] | None = None
    smallest: int = 1

    def __post_init__(self) -> None:
        checked_share(self.option, self.rate)

    def places(self, layout: Layout) -> tuple[int, ...]:
        if self.at is not None:
            return checked_places(self.at, layout.depth)
        return tuple(sorted({min(layout.depth - 1, (layout.depth * quarter) // 4) for quarter in (1, 2, 3)}))

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self._at_rate(1.0 - strength, tokens, layout)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        counts = self._at_rate(self.rate, tokens, layout)
        if self.rate < 1.0 and counts[-1] == tokens > self.smallest:
            raise BudgetError(
                f"rate={self.rate:g} of {tokens} tokens is all of them; use rate={largest_share(tokens):.3f} or less"
            )
        return counts

    def fewest(self, entering: int, layout: Layout) -> int:
        return min(self.smallest, entering)

    def _at_rate(self, rate: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        counts = []
        for _ in self.places(layout):
            tokens = max(self.fewest(tokens, layout), math.ceil(rate * tokens - _EPS))
            counts.append(tokens)
        return tuple(counts)


@dataclass(frozen=True)
class InFrontOfStages(Stages):
    """Stages of a method that reduces behind a block: one block earlier, so that the same blocks see fewer tokens."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        places = super().places(layout)
        return places if self.at is not None else tuple(sorted({max(0, block - 1) for block in places}))


@dataclass(frozen=True)
class InEveryBlock(Stages):
    """Stages in every block."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(layout.depth))


@dataclass(frozen=True)
class HalfOfEveryBlock(InEveryBlock):
    """Stages in every block, of which each can merge half of its tokens."""

    def fewest(self, entering: int, layout: Layout) -> int:
        return entering - entering // 2


@dataclass(frozen=True)
class MergedShare(Stages):
    """Stages of a method whose option is the share that is merged away."""

    option: ClassVar[str] = "ratio"


@dataclass(frozen=True)
class GridFactor(Stages):
    """Stages of a method whose option is the factor by which rows and columns are fewer."""

    option: ClassVar[str] = "factor"


@dataclass(frozen=True)
class EveryBlock:
    """The same number r of tokens removed in every block (ToMe), spread evenly where r is not whole (9.4: 9 and 10).

    A block removes at most half of its tokens, as pairs are merged: at the strongest setting every block halves them.
    """

    option: ClassVar[str] = "r"

    r: int = 8
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checked_count(self.option, self.r, smallest=0, example=8)

    def places(self, layout: Layout) -> tuple[int, ...]:
        return tuple(range(layout.depth)) if self.at is None else checked_places(self.at, layout.depth)

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        removed, counts, left = strength * tokens / 2, [], tokens
        for i in range(len(self.places(layout))):
            left = min(left, max(self.fewest(left, layout), tokens - round(removed * (i + 1))))
            counts.append(left)
        return tuple(counts)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        r, counts, left = self.r, [], tokens
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
        return alternate_tokens(entering, layout)


@dataclass(frozen=True)
class BeforeLast:
    """The places of another schedule but for the last block, which all tokens enter again (last-layer fusion)."""

    whole: Schedule

    @property
    def option(self) -> str:
        return self.whole.option

    def places(self, layout: Layout) -> tuple[int, ...]:
        return tuple(block for block in self.whole.places(layout) if block < layout.depth - 1)

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self.whole.counts(strength, tokens, layout)[: len(self.places(layout))]

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self.whole.default(tokens, layout)[: len(self.places(layout))]

    def fewest(self, entering: int, layout: Layout) -> int:
        return self.whole.fewest(entering, layout)


def alternate_tokens(entering: int, layout: Layout) -> int:
    """Tokens left where every second one of the sequence goes; the one behind an odd prefix is no candidate."""
    return max(1, (entering + layout.num_prefix_tokens % 2) // 2)


def checked_places(at: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """`at` sorted and without repeats, negative indices counted from the end.

    Raises:
        BudgetError: no indices, or one outside the model.
    """
    if not isinstance(at, Sequence) or not at or any(isinstance(b, bool) or not isinstance(b, int) for b in at):
        raise BudgetError(f"places must list block indices, got {at!r}; for example places=({depth // 2},)")
    wrong = [block for block in at if not -depth <= block < depth]
    if wrong:
        raise BudgetError(f"block {wrong[0]} does not exist: the model has blocks 0 to {depth - 1}")
    return tuple(sorted({block % depth for block in at}))
