"""From a budget to the tokens of each window that a block's MLP runs on."""

from __future__ import annotations

from collections.abc import Mapping

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError
from tokenprune.method import Method
from tokenprune.narrow.costs import Count, Counted
from tokenprune.schedule import Layout, kept_count, largest_share

Counts = dict[int, int]


def fewest(method: Method, tokens: int) -> int:
    """The fewest of a window's tokens that a method can leave."""
    return method.schedule.fewest(tokens, Layout(1, 0))


def by_share(share: float, method: Method, tokens: Mapping[int, int], asked: object) -> Counts:
    """The same share in each block of windows of {block: tokens}.

    Raises:
        BudgetError: the method must leave more, or nothing would be left out.
    """
    counts = {index: kept_count(share, area) for index, area in tokens.items()}
    for index, count in counts.items():
        least = fewest(method, tokens[index])
        if count < least:
            raise BudgetError(
                f"{asked} asks {method.name} for {count} of {tokens[index]} tokens of a window, and it must leave"
                f" {least}; use keep={least / tokens[index] + 0.0005:.3f} or more"
            )
    if share < 1 and not any(count < tokens[index] for index, count in counts.items()):
        most = max(tokens.values())
        raise BudgetError(
            f"{asked} leaves no token out: windows have {most} at most;"
            + (f" use keep={largest_share(most):.3f} or less" if most > 1 else " this model cannot be reduced")
        )
    return counts


def worthwhile(counts: Counts, counted: Counted, whole: Counted) -> tuple[Counts, dict[int, int]]:
    """`counts` without the blocks in which choosing costs what it saves; and what the others cost."""
    kept = {index: count for index, count in counts.items() if counted.blocks[index] < whole.blocks[index]}
    return kept, {index: counted.blocks[index] for index in kept}


def by_cost(budget: Budget, method: Method, tokens: Mapping[int, int], whole: Counted, count: Count) -> Counts:
    """The plan whose cost is nearest to a flops budget: the same share in each block, and single tokens more.

    Raises:
        BudgetError: it cannot be met within 1%; the message names what can.
    """
    aim = budget.value * whole.total
    least = {index: fewest(method, area) for index, area in tokens.items()}
    known: dict[tuple[int, ...], Counted] = {}

    def at(share: float) -> Counts:
        return {index: max(least[index], kept_count(share, area)) for index, area in tokens.items()}

    def priced(counts: Counts) -> tuple[Counts, dict[int, int], int]:
        key = tuple(counts.values())
        if key not in known:
            known[key] = count(counts)
        kept, costs = worthwhile(counts, known[key], whole)
        return kept, costs, whole.with_blocks(costs)

    low, high = 1e-9, 1.0
    floor = priced(at(low))[2] / whole.total
    if floor > budget.value + 0.005:
        raise BudgetError(
            f"{budget} cannot be met by {method.name}, which leaves attention as it is here: with the fewest tokens in"
            f" each MLP the forward still costs {floor:.2f} of the unpatched one; use"
            f" flops={min(1.0, floor + 0.01):.2f} or more"
        )
    while at(low) != at(high) and high - low > 1e-4:
        middle = (low + high) / 2
        if priced(at(middle))[2] <= aim:
            low = middle
        else:
            high = middle
    counts, costs, total = priced(at(low))
    more, dearer, _ = priced(at(high))
    for index in sorted(counts):
        step = dearer.get(index, whole.blocks[index]) - costs[index]
        if abs(total + step - aim) < abs(total - aim):
            total += step
            if index in more:
                counts[index] = more[index]
            else:
                del counts[index]
    if abs(total - aim) > 0.01 * whole.total:
        raise BudgetError(
            f"{budget} falls between whole tokens of this model's windows; flops={total / whole.total:.3f} can be met"
        )
    return counts
