"""What a forward costs with fewer tokens in its MLPs: counted where it runs on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenprune.flop_count import FlopCount


@dataclass(frozen=True)
class Counted:
    """Multiply-adds of one image's forward. total: of all of it; blocks: of each, spans: of its MLP."""

    total: int
    blocks: tuple[int, ...]
    spans: tuple[int, ...]

    def with_blocks(self, others: Mapping[int, int]) -> int:
        """The total where some blocks cost {block: multiply-adds} instead."""
        return self.total + sum(cost - self.blocks[index] for index, cost in others.items())


@dataclass
class Probe:
    """Counts one forward of a ghost."""

    count: FlopCount = field(default_factory=FlopCount)
    marks: dict[tuple[int, str], int] = field(default_factory=dict)

    def mark(self, index: int, point: str) -> None:
        """Note the multiply-adds so far."""
        self.marks[index, point] = self.count.multiply_adds

    def counted(self, blocks: int) -> Counted:
        """What was counted in a model of that many blocks."""

        def between(first: str, last: str) -> tuple[int, ...]:
            return tuple(self.marks[i, last] - self.marks[i, first] for i in range(blocks))

        return Counted(self.count.multiply_adds, between("enter", "leave"), between("chosen", "widened"))


# {block: tokens of each window} -> what that costs.
Count = Callable[[Mapping[int, int]], Counted]
