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
    to none, and last of the head. scoring: of a token in front of each block, to choose windows. dense: whether the
    head is one of all tokens."""

    grid: Grid
    layouts: tuple[Layout, ...]
    blocks: tuple[BlockCost, ...]
    between: tuple[int, ...]
    scoring: tuple[float, ...]
    dense: bool = False

    def whole(self, index: int, grid: Grid) -> float:
        """A block that computes all windows."""
        cost, layout = self.blocks[index], self.layouts[index]
        return cost.once + layout.windows(grid) * cost.window + layout.tokens(grid) * cost.token

    def reduced(self, index: int, keep: float) -> float:
        """A block that computes `keep` windows, which are known."""
        cost, layout = self.blocks[index], self.layouts[index]
        return cost.once + keep * (cost.window + layout.tiling.area * cost.token)

    def total(self, grid: Grid, keep: Mapping[int, float]) -> float:
        """The forward at a first grid, with {block: windows computed} in some blocks, of whose stages tokens are
        scored."""
        cost: float = self.between[-1]
        if self.dense:
            cost *= self.layouts[-1].tokens(grid) / self.layouts[-1].tokens(self.grid)
        for index, layout in enumerate(self.layouts):
            cost += self.between[index] * layout.tokens(grid) / layout.tokens(self.grid)
            cost += self.reduced(index, keep[index]) if index in keep else self.whole(index, grid)
        stages = {self.layouts[index].stage for index in keep}
        for layout, scoring in zip(self.layouts, self.scoring, strict=True):
            cost += scoring * layout.tokens(grid) if layout.stage in stages else 0
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


def window_costs(
    run: Callable[[Probe, int], int], layouts: tuple[Layout, ...], grid: Grid, *, dense: bool
) -> WindowCosts:
    """The costs of a model. run: counts a forward of so many images under a probe, in multiply-adds."""
    one, two = Probe(), Probe()
    totals = run(one, 1), run(two, 2)
    blocks, between, scoring, ends = [], [], [], (0, 0)
    for index, layout in enumerate(layouts):
        enter, chosen, attended, leave = (
            (one.marks[index, point], two.marks[index, point]) for point in ("enter", "chosen", "attended", "leave")
        )
        scoring.append((chosen[0] - enter[0]) / layout.tokens(grid))
        first, both = attended[0] - chosen[0], attended[1] - chosen[1]
        blocks.append(BlockCost(2 * first - both, both - first, (leave[0] - attended[0]) / layout.tiling.area))
        between.append(enter[0] - ends[0])
        ends = leave
    between.append(totals[0] - ends[0])
    return WindowCosts(grid, layouts, tuple(blocks), tuple(between), tuple(scoring), dense)
