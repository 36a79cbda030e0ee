"""The schedule over the steps of a denoising run: how strongly each part of it is reduced, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenprune.errors import BudgetError

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Part:
    """Strength from `start` to `end`, shares of the run: of a stack 0 leaves it whole, 1 removes all that the budget
    says; from `first` to `last` along a straight line or half a cosine. only: names (or beginnings of names) of the
    stacks that it is for, "edges" for those at the edges of the stages, empty for all."""

    start: float
    end: float
    first: float
    last: float
    shape: Shape = "linear"
    only: tuple[str, ...] = ()

    def applies(self, stack: str, edge: bool) -> bool:
        """Whether it is for this stack."""
        return not self.only or any((edge and name == "edges") or stack.startswith(name) for name in self.only)

    def strength(self, position: float) -> float:
        """At `position` of the run, in [start, end)."""
        along = (position - self.start) / (self.end - self.start)
        if self.shape == "cosine":
            along = (1 - math.cos(math.pi * along)) / 2
        return self.first + (self.last - self.first) * along


@dataclass(frozen=True)
class Steps:
    """Parts of a run; where several hold, the first one decides, where none does the strength is 1."""

    parts: tuple[Part, ...] = ()

    def strength(self, position: float, stack: str, edge: bool) -> float:
        """How much of what the budget removes of a stack is removed at `position` in [0, 1) of the run."""
        for part in self.parts:
            if part.start <= position < part.end and part.applies(stack, edge):
                return part.strength(position)
        return 1.0

    def borders(self) -> tuple[float, ...]:
        """Positions between which the report tells steps apart."""
        return tuple(sorted({0.0, 1.0, *(p.start for p in self.parts), *(p.end for p in self.parts)}))


EVERY_STEP = Steps()

# AT-EDM's denoising-steps-aware pruning: for the first 15 of 50 steps, in which attention maps are chaotic, the first
# stack of each stage on the way down and the last of each on the way up stay whole.
PRUNE_LESS = Steps((Part(0.0, 0.3, 0.0, 0.0, only=("edges",)),))


def parse_steps(steps: Any) -> Steps:
    """Steps as a user writes them: {(start, end): strength}, in shares of the run's steps.

    A strength is a number in [0, 1] (0 leaves all tokens, 1 removes as many as the budget says), (first, last) for a
    straight ramp, ("cosine", first, last), or {stacks: strength} where stacks is the beginning of a stack's name in
    the report, or "edges". Outside of the ranges the strength is 1. `{}` is the same strength everywhere.

    Raises:
        BudgetError: it is none of these.
    """
    if isinstance(steps, Steps):
        return steps
    wrong = BudgetError(
        f"steps must map ranges of the run to strengths in [0, 1], got {steps!r}; for example {{(0.0, 0.3): 0.0}}"
        " leaves the first 30% of the steps alone"
    )
    if not isinstance(steps, Mapping):
        raise wrong
    parts = []
    for key, value in steps.items():
        if not (
            isinstance(key, tuple) and len(key) == 2 and all(_number(k) for k in key) and 0 <= key[0] < key[1] <= 1
        ):
            raise wrong
        for only, strength in value.items() if isinstance(value, Mapping) else [(None, value)]:
            names = () if only is None else (only,)
            if not all(isinstance(name, str) for name in names):
                raise wrong
            parts.append(_part(key, strength, names, wrong))
    return Steps(tuple(parts))


def _part(key: tuple[float, float], strength: Any, only: tuple[str, ...], wrong: BudgetError) -> Part:
    shape: Shape = "linear"
    if isinstance(strength, tuple) and len(strength) == 3 and strength[0] in ("linear", "cosine"):
        shape, strength = strength[0], strength[1:]
    ends = strength if isinstance(strength, tuple) else (strength, strength)
    if len(ends) != 2 or not all(_number(end) and 0 <= end <= 1 for end in ends):
        raise wrong
    return Part(float(key[0]), float(key[1]), float(ends[0]), float(ends[1]), shape, only)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
