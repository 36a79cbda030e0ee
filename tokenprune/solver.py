"""From a budget to the number of tokens that leave each place."""

from __future__ import annotations

import math
from collections.abc import Callable

from tokenprune.budget import Budget
from tokenprune.costs import CostModel
from tokenprune.errors import BudgetError
from tokenprune.schedule import Layout, Schedule, kept_count, largest_share

Counts = dict[int, int]
MET = 0.01
"""How far from a flops budget, as a share of the unpatched multiply-adds, what is computed may be."""


def solve(
    budget: Budget,
    schedule: Schedule,
    tokens: int,
    layout: Layout,
    costs: CostModel | None,
    target: float | None = None,
) -> Counts:
    """Tokens leaving each place {block: count} for `tokens` entering the first.

    costs: needed for a flops budget only. target: multiply-adds to aim at in its place (a corrected aim).

    Raises:
        BudgetError: the method cannot meet the budget on this model; the message names what it can reach.
    """
    places = schedule.places(layout)
    if budget.kind in ("default", "own"):
        return dict(zip(places, schedule.default(tokens, layout), strict=True))
    if budget.kind == "flops":
        assert costs is not None
        return _by_cost(budget, schedule, places, tokens, layout, costs, target)
    return _by_last(budget, schedule, places, tokens, layout)


def follow_shares(shares: dict[int, float], schedule: Schedule, tokens: int, layout: Layout) -> Counts:
    """Counts of an explicit schedule {block: share of the entering tokens that leave}.

    Raises:
        BudgetError: fewer tokens asked for at a place than the method can leave there.
    """
    counts: Counts = {}
    entering = tokens
    for block, share in sorted(shares.items()):
        keep = kept_count(share, tokens)
        if keep < schedule.fewest(tokens, layout):
            raise BudgetError(
                f"schedule asks for {keep} of {tokens} tokens behind block {block}; the method leaves at least"
                f" {schedule.fewest(tokens, layout)} there, a share of {schedule.fewest(tokens, layout) / tokens:.2f}"
            )
        counts[block] = tokens = keep
    if tokens == entering and min(shares.values()) < 1.0:
        raise BudgetError(
            f"every share of the schedule keeps all of {tokens} tokens; use {largest_share(tokens):.3f} or less at one"
        )
    return counts


def shares_of(counts: Counts, tokens: int) -> dict[int | str, float]:
    """`counts` as an explicit schedule, rounded so that `follow_shares` gives them again."""
    shares: dict[int | str, float] = {}
    for block, count in sorted(counts.items()):
        shares[block] = math.floor(1e6 * count / tokens) / 1e6
        tokens = count
    return shares


def _by_last(budget: Budget, schedule: Schedule, places: tuple[int, ...], tokens: int, layout: Layout) -> Counts:
    keep = int(budget.value) if budget.kind == "tokens" else kept_count(budget.value, tokens)
    if keep > tokens:
        raise BudgetError(f"tokens={keep} asked, but only {tokens} prunable tokens enter; use at most {tokens}")
    if budget.kind == "keep" and keep == tokens:
        raise BudgetError(
            f"{budget} of {tokens} tokens drops none; use keep={largest_share(tokens):.3f} or less, or keep=1.0"
        )
    fewest = schedule.counts(1.0, tokens, layout)[-1]
    if keep < fewest:
        raise BudgetError(
            f"{budget} asks for {keep} of {tokens} tokens; at blocks {_listed(places)} the method leaves at least"
            f" {fewest}: use tokens={fewest} or more"
        )
    counts = _weakest(lambda c: c[-1] <= keep, schedule, tokens, layout)
    return dict(zip(places, (max(count, keep) for count in counts), strict=True))


def _by_cost(
    budget: Budget,
    schedule: Schedule,
    places: tuple[int, ...],
    tokens: int,
    layout: Layout,
    costs: CostModel,
    target: float | None,
) -> Counts:
    base = costs.total(tokens)

    def cost(counts: tuple[int, ...]) -> float:
        return costs.total(tokens, dict(zip(places, counts, strict=True)))

    floor = cost(schedule.counts(1.0, tokens, layout)) / base
    if floor > budget.value + 0.005:
        raise BudgetError(
            f"{budget} cannot be met: with nearly every token removed at blocks {_listed(places)} the forward still"
            f" costs {floor:.2f} of the unpatched one; use flops={min(1.0, floor + 0.01):.2f} or more, or earlier"
            " places"
        )
    aim = budget.value * base if target is None else target
    counts = _strongest(lambda c: cost(c) >= aim, schedule, tokens, layout)
    counts = _refined(counts, cost, aim, schedule, tokens, layout)
    if all(count == tokens for count in counts):
        raise BudgetError(f"{budget} of {tokens} tokens removes none at blocks {_listed(places)}; use a smaller budget")
    found = dict(zip(places, counts, strict=True))
    if target is None:
        check_met(budget, found, costs.total(tokens, found) / base)
    return found


def check_met(budget: Budget, counts: Counts, reached: float) -> None:
    """Raise BudgetError where the share `reached` by the nearest `counts` is not the one that was asked for."""
    if abs(reached - budget.value) > MET:
        raise BudgetError(
            f"{budget} falls between whole tokens at blocks {_listed(tuple(counts))}; flops={reached:.3f} can be met"
        )


def _strongest(
    allowed: Callable[[tuple[int, ...]], bool], schedule: Schedule, tokens: int, layout: Layout
) -> tuple[int, ...]:
    """Counts of the greatest strength that is still allowed."""
    low, high = 0.0, 1.0
    if allowed(schedule.counts(high, tokens, layout)):
        return schedule.counts(high, tokens, layout)
    for _ in range(40):
        middle = (low + high) / 2
        if allowed(schedule.counts(middle, tokens, layout)):
            low = middle
        else:
            high = middle
    return schedule.counts(low, tokens, layout)


def _weakest(
    allowed: Callable[[tuple[int, ...]], bool], schedule: Schedule, tokens: int, layout: Layout
) -> tuple[int, ...]:
    """Counts of the smallest strength that is allowed."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if allowed(schedule.counts(middle, tokens, layout)):
            high = middle
        else:
            low = middle
    return schedule.counts(high, tokens, layout)


def _refined(
    counts: tuple[int, ...],
    cost: Callable[[tuple[int, ...]], float],
    aim: float,
    schedule: Schedule,
    tokens: int,
    layout: Layout,
) -> tuple[int, ...]:
    """`counts` moved by single tokens at single places, as long as that brings the cost nearer to the aim."""
    error = abs(cost(counts) - aim)
    for _ in range(4 * len(counts) + 16):
        moved = [m for m in _moves(counts) if _valid(m, schedule, tokens, layout)]
        best = min(moved, key=lambda m: abs(cost(m) - aim), default=counts)
        if abs(cost(best) - aim) >= error:
            break
        counts, error = best, abs(cost(best) - aim)
    return counts


def _moves(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*counts[:i], counts[i] + step, *counts[i + 1 :]) for i in range(len(counts)) for step in (-1, 1)]


def _valid(counts: tuple[int, ...], schedule: Schedule, tokens: int, layout: Layout) -> bool:
    for count in counts:
        if not schedule.fewest(tokens, layout) <= count <= tokens:
            return False
        tokens = count
    return True


def _listed(places: tuple[int, ...]) -> str:
    return f"{places[0]} to {places[-1]}" if len(places) > 4 else ", ".join(map(str, places))
