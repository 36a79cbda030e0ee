"""What a forward costs as a function of the windows computed in each block, counted on the model's own modules.

A window's attention and a token's MLP cost the same wherever they are, and something may be worked out once for all
windows; one image and two images of one window a block give all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tokenprune.flop_count import FlopCount
from tokenprune.windows.host import Layout
from tokenprune.windows.tiling import Grid


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of a block: once, of each window's attention, and of each token's MLP."""

    once: int
    window: int
    token: float


@dataclass(frozen=True)
class WindowCosts:
    """Of one image's forward. grid: at which it was counted. between: multiply-adds in front of each block that belong
    to none, and last of the head."""

    grid: Grid
    layouts: tuple[Layout, ...]
    blocks: tuple[BlockCost, ...]
    between: tuple[int, ...]

    def whole(self, index: int, grid: Grid) -> float:
        """A block that computes all windows."""
        cost, layout = self.blocks[index], self.layouts[index]
        return cost.once + layout.windows(grid) * cost.window + layout.tokens(grid) * cost.token

    def reduced(self, index: int, keep: int) -> float:
        """A block that computes `keep` windows."""
        cost, layout = self.blocks[index], self.layouts[index]
        return cost.once + keep * (cost.window + layout.tiling.area * cost.token)

    def total(self, grid: Grid, keep: Mapping[int, int]) -> float:
        """The forward at a first grid, with {block: windows computed} in some blocks."""
        cost: float = self.between[-1]
        for index, layout in enumerate(self.layouts):
            cost += self.between[index] * layout.tokens(grid) / layout.tokens(self.grid)
            cost += self.reduced(index, keep[index]) if index in keep else self.whole(index, grid)
        return cost


@dataclass
class Probe:
    """Counts one forward of a ghost that computes a single window in each block."""

    count: FlopCount | None = None
    marks: dict[tuple[int, str], int] = field(default_factory=dict)

    def mark(self, index: int, point: str) -> None:
        """Note the multiply-adds so far."""
        assert self.count is not None
        self.marks[index, point] = self.count.multiply_adds


def window_costs(run: Callable[[Probe, int], int], layouts: tuple[Layout, ...], grid: Grid) -> WindowCosts:
    """The costs of a model. run: counts a forward of so many images under a probe, in multiply-adds."""
    one, two = Probe(), Probe()
    totals = run(one, 1), run(two, 2)
    blocks, between, ends = [], [], (0, 0)
    for index, layout in enumerate(layouts):
        enter, attended, leave = (
            (one.marks[index, point], two.marks[index, point]) for point in ("enter", "attended", "leave")
        )
        first, both = attended[0] - enter[0], attended[1] - enter[1]
        blocks.append(BlockCost(2 * first - both, both - first, (leave[0] - attended[0]) / layout.tiling.area))
        between.append(enter[0] - ends[0])
        ends = leave
    between.append(totals[0] - ends[0])
    return WindowCosts(grid, layouts, tuple(blocks), tuple(between))
