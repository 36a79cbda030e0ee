"""What a denoiser's forward costs as a function of the tokens computed in each stack, counted on its own modules.

With K tokens in a stack (scoring, selecting and recovering included) the multiply-adds are a polynomial of degree two
in K, and stacks add up, so a count with all tokens and three with fewer give the whole function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tokenprune.costs import Curve
from tokenprune.flop_count import FlopCount


@dataclass(frozen=True)
class StackCost:
    """Multiply-adds of one image in a stack: left whole, and with K of `tokens` computed."""

    tokens: int
    whole: float
    reduced: Curve


@dataclass(frozen=True)
class DenoiserCosts:
    """Of one forward, for one image. total: left whole, all of it."""

    total: float
    stacks: Mapping[str, StackCost]

    def forward(self, keep: Mapping[str, int]) -> float:
        """Multiply-adds of a forward that computes keep[stack] tokens in those stacks."""
        return self.total + sum(self.stacks[s].reduced(k) - self.stacks[s].whole for s, k in keep.items())


@dataclass
class Probe:
    """Counts one forward of a ghost with keep[stack] tokens; notes each stack's tokens and multiply-adds."""

    keep: Mapping[str, int]
    count: FlopCount | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)

    def mark(self, stack: str, point: str, x: Tensor) -> None:
        """Note the multiply-adds so far."""
        assert self.count is not None
        now = self.count.multiply_adds
        self.tokens[stack] = x.shape[1]
        self.spent[stack] = now - self.spent[stack] if point == "leave" else now


def count_costs(run: Callable[[Probe], int], batch: int, fewest: Callable[[int], int]) -> DenoiserCosts:
    """The costs of a denoiser. run: counts a forward under a probe, in multiply-adds; fewest: of N tokens the fewest
    that a selection leaves."""
    whole = Probe({})
    total = run(whole)
    points: dict[str, dict[int, int]] = {stack: {} for stack in whole.tokens}
    for share in (1.0, 2 / 3, 1 / 3):
        probe = Probe({s: max(1, n - max(1, round(share * (n - fewest(n))))) for s, n in whole.tokens.items() if n > 1})
        run(probe)
        for stack, keep in probe.keep.items():
            points[stack][keep] = probe.spent[stack]
    return DenoiserCosts(
        total / batch,
        {
            stack: StackCost(
                tokens,
                whole.spent[stack] / batch,
                Curve(tuple((keep, spent / batch) for keep, spent in points[stack].items())),  # type: ignore[misc]
            )
            for stack, tokens in whole.tokens.items()
            if points[stack]
        },
    )
