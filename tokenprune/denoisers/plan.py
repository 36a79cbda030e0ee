"""Plan: from a budget to the number of tokens that each stack computes at each step of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from tokenprune.budget import Budget
from tokenprune.denoisers.costs import DenoiserCosts
from tokenprune.denoisers.steps import Steps
from tokenprune.errors import BudgetError
from tokenprune.schedule import kept_count
from tokenprune.solver import MET


@dataclass(frozen=True)
class Plan:
    """share: of the tokens of a stack that is computed at full strength (shares: of those stacks that a schedule
    names, and no other). edges: stacks that "edges" means. barred: {stack: why it is left alone always}."""

    costs: DenoiserCosts
    steps: Steps
    share: float
    edges: frozenset[str]
    fewest: Callable[[int], int]
    shares: Mapping[str, float] | None = None
    barred: Mapping[str, str] = field(default_factory=dict)

    def keep(self, position: float) -> dict[str, int]:
        """{stack: tokens computed} at a position of the run; those that are left whole are not in it."""
        found = {}
        for stack, cost in self.costs.stacks.items():
            share = self.share if self.shares is None else self.shares.get(stack)
            strength = self.steps.strength(position, stack, stack in self.edges)
            if share is None or stack in self.barred or strength == 0.0:
                continue
            count = max(self.fewest(cost.tokens), kept_count(1.0 - strength * (1.0 - share), cost.tokens))
            if self.shares is not None or (count < cost.tokens and cost.reduced(count) < cost.whole):
                found[stack] = count
        return found

    def mean(self, positions: Sequence[float]) -> float:
        """Multiply-adds of a forward, the mean over a run."""
        return fmean(self.costs.forward(self.keep(position)) for position in positions)

    def skipped(self, positions: Sequence[float]) -> dict[str, str]:
        """Stacks that are whole at every step, and why."""
        touched = {stack for position in positions for stack in self.keep(position)}
        why = dict(self.barred)
        for stack, cost in self.costs.stacks.items():
            if stack in touched or stack in why:
                continue
            if self.shares is not None:
                why[stack] = "left alone: the schedule does not name it"
            elif all(self.steps.strength(p, stack, stack in self.edges) == 0.0 for p in positions):
                why[stack] = "left alone: the steps' schedule spares it in this run"
            else:
                why[stack] = f"left alone: of {cost.tokens} tokens, scoring there costs more than it saves"
        return why

    def remedy(self, positions: Sequence[float]) -> str:
        """What to do where every stack is whole."""
        return "use a smaller budget"


def solve(budget: Budget, plan: Callable[[float], Plan], positions: Sequence[float], default: float) -> Plan:
    """The plan that meets a budget. plan: from a share; default: the method's own share.

    Raises:
        BudgetError: it cannot be met; the message names the floor.
    """
    if budget.kind == "flops":
        return _by_cost(budget, plan, positions)
    found = plan(budget.value if budget.kind == "keep" else default)
    if not any(found.keep(position) for position in positions):
        raise BudgetError(f"{budget} leaves every stack whole: {_reasons(found, positions)}; {found.remedy(positions)}")
    return found


def _by_cost(budget: Budget, plan: Callable[[float], Plan], positions: Sequence[float]) -> Plan:
    least = plan(1e-9)
    total = least.costs.total
    aim, floor = budget.value * total, least.mean(positions) / total
    if floor > budget.value + 0.005:
        raise BudgetError(
            f"{budget} cannot be met: with nearly every token left out of its stacks the run still costs {floor:.2f} of"
            f" the unpatched one; use flops={min(1.0, floor + 0.01):.2f} or more, or steps={{}} to reduce every step"
            " alike"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if plan(middle).mean(positions) < aim:
            low = middle
        else:
            high = middle
    found = min((plan(low), plan(high)), key=lambda one: abs(one.mean(positions) - aim))
    if not any(found.keep(position) for position in positions):
        raise BudgetError(f"{budget} leaves every stack whole: {_reasons(found, positions)}; {found.remedy(positions)}")
    reached = found.mean(positions) / total
    if abs(reached - budget.value) > MET:
        raise BudgetError(f"{budget} falls between whole tokens of its stacks; flops={reached:.3f} can be met")
    return found


def _reasons(plan: Plan, positions: Sequence[float]) -> str:
    return "; ".join(f"{stack} is {why}" for stack, why in list(plan.skipped(positions).items())[:3])


def places(plan: Plan, positions: tuple[float, ...]) -> list[dict[str, Any]]:
    """(name, tokens in, tokens out, steps) of each stack in each part of the run, tokens out in the mean."""
    borders, rows = plan.steps.borders(), []
    for stack, cost in plan.costs.stacks.items():
        told: list[tuple[float, float, float]] = []
        for first, end in pairwise(borders):
            kept = [plan.keep(p).get(stack, cost.tokens) for p in positions if first <= p < end]
            if not kept:
                continue
            mean = kept[0] if len(set(kept)) == 1 else round(fmean(kept), 1)
            if told and told[-1][2] == mean:
                told[-1] = (told[-1][0], end, mean)
            else:
                told.append((first, end, mean))
        if all(mean == cost.tokens for _, _, mean in told):
            continue
        for first, end, mean in told:
            steps = "every step" if len(told) == 1 else f"{first:.0%} to {end:.0%} of the run"
            rows.append({"name": stack, "tokens_in": cost.tokens, "tokens_out": mean, "steps": steps})
    return rows
