"""From a budget to the number of windows that each block computes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError
from tokenprune.schedule import kept_count, largest_share
from tokenprune.windows.costs import WindowCosts
from tokenprune.windows.host import Layout
from tokenprune.windows.tiling import Grid

Counts = dict[int, int]


@dataclass(frozen=True)
class Plan:
    """keep: {block: windows computed}; those that compute all are not in it. skipped: {block: why it is whole}."""

    keep: Counts
    skipped: dict[str, str]


def shares_of(budget: Budget, layouts: Sequence[Layout], depth: int) -> dict[int, float]:
    """{block: share} of a schedule that names blocks or their numbers among all `depth` blocks of the model.

    Raises:
        BudgetError: there is no such block, or it is named twice.
    """
    numbers = [layout.number for layout in layouts]
    known = {layout.name: index for index, layout in enumerate(layouts)}
    shares: dict[int, float] = {}
    for place, share in budget.shares:
        number = int(place) if re.fullmatch(r"-?[0-9]+", place) else None
        if number is not None and -depth <= number < 0:
            number += depth
        index = known.get(place, numbers.index(number) if number in numbers else None)
        if index is None:
            raise BudgetError(
                f"schedule names the place {place!r}; the blocks of windows are"
                f" {', '.join(f'{layout.number} ({layout.name})' for layout in layouts)}"
            )
        if index in shares:
            raise BudgetError(f"schedule names {layouts[index].name} twice; give each block one share")
        shares[index] = share
    return shares


def by_shares(shares: dict[int, float], layouts: Sequence[Layout], grid: Grid) -> Plan:
    """The plan of an explicit schedule, which runs its places even where it keeps every window."""
    keep = {index: kept_count(share, layouts[index].windows(grid)) for index, share in shares.items()}
    whole = [layout.name for index, layout in enumerate(layouts) if index not in shares]
    skipped = dict.fromkeys(whole, "left alone: the schedule does not name it")
    return Plan(keep, skipped)


def by_ratios(ratios: Sequence[float], costs: WindowCosts, grid: Grid) -> Plan:
    """The plan of the shares that are left out in each block, rounded as SparseViT does: down to whole windows."""
    counts = {}
    for index, (ratio, layout) in enumerate(zip(ratios, costs.layouts, strict=True)):
        windows = layout.windows(grid)
        counts[index] = max(1, math.floor(windows * (1 - ratio) + 1e-6)) if ratio > 0 else windows
    return _worthwhile(counts, costs, grid)


def by_share(share: float, costs: WindowCosts, grid: Grid) -> Plan:
    """The plan that computes the same share in each block."""
    return _worthwhile(_even(share, costs, grid), costs, grid)


def by_cost(
    budget: Budget,
    costs: WindowCosts,
    grid: Grid,
    counts_at: Callable[[float, WindowCosts, Grid], Counts] | None = None,
) -> Plan:
    """The plan whose cost is nearest to a flops budget: the same share in each block, and single windows more.

    counts_at: windows of each block at a strength in (0, 1], of which more compute no fewer, in place of that share.

    Raises:
        BudgetError: it cannot be met within 1%; the message names what can.
    """
    counts_at = counts_at or _even
    total = costs.total(grid, {})
    aim = budget.value * total

    def plan(strength: float) -> Plan:
        return _worthwhile(counts_at(max(strength, 1e-9), costs, grid), costs, grid)

    def cost(plan: Plan) -> float:
        return costs.total(grid, plan.keep)

    floor = cost(plan(0.0)) / total
    if floor > budget.value + 0.005:
        raise BudgetError(
            f"{budget} cannot be met: with one window left in each block the forward still costs {floor:.2f} of the"
            f" unpatched one; use flops={min(1.0, floor + 0.01):.2f} or more"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if cost(plan(middle)) <= aim:
            low = middle
        else:
            high = middle
    found = _filled(plan(low), costs, grid, aim)
    if abs(cost(found) - aim) > 0.01 * total:
        raise BudgetError(
            f"{budget} falls between whole windows of this model; flops={cost(found) / total:.3f} can be met"
        )
    return found


def refuse_empty(plan: Plan, budget: Budget, layouts: Sequence[Layout], grid: Grid) -> None:
    """Raise where a plan leaves every block whole."""
    if not plan.keep:
        most = max(layout.windows(grid) for layout in layouts)
        raise BudgetError(
            f"{budget} leaves no window out: blocks have {most} at most at this size;"
            + (f" use keep={largest_share(most):.3f} or less" if most > 1 else " use a larger image")
        )


def _filled(plan: Plan, costs: WindowCosts, grid: Grid, aim: float) -> Plan:
    """`plan` with single windows more in single blocks, as long as its cost stays below the aim."""
    order = sorted(plan.keep, key=lambda index: costs.reduced(index, 0) - costs.reduced(index, 1))
    grown = True
    while grown:
        grown = False
        for index in order:
            counts = {**_all(costs, grid), **plan.keep}
            if index not in plan.keep:
                continue
            more = _worthwhile({**counts, index: counts[index] + 1}, costs, grid)
            if costs.total(grid, more.keep) <= aim:
                plan, grown = more, True
    return plan


def _even(share: float, costs: WindowCosts, grid: Grid) -> Counts:
    return {index: kept_count(share, layout.windows(grid)) for index, layout in enumerate(costs.layouts)}


def _all(costs: WindowCosts, grid: Grid) -> Counts:
    return {index: layout.windows(grid) for index, layout in enumerate(costs.layouts)}


def _worthwhile(counts: Counts, costs: WindowCosts, grid: Grid) -> Plan:
    """The plan of `counts`, without the blocks in which that saves nothing."""
    keep, skipped = {}, {}
    for index, count in counts.items():
        layout = costs.layouts[index]
        windows = layout.windows(grid)
        if count < windows and costs.reduced(index, count) < costs.whole(index, grid):
            keep[index] = count
        elif windows == 1:
            skipped[layout.name] = "left alone: one window is all of its grid"
        elif count < windows:
            skipped[layout.name] = (
                f"left alone: {count} of {windows} windows cost as much as all, without their padding"
            )
        else:
            skipped[layout.name] = f"left alone: all of its {windows} windows are asked for"
    return Plan(keep, skipped)
