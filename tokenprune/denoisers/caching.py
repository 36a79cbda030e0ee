"""CachingPatch: a method that takes a part of the tokens from an earlier step, on one denoiser."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.caches import Watched, watched
from tokenprune.denoisers.caching_sites import MlpSite, TokenSite
from tokenprune.denoisers.costs import DenoiserCosts
from tokenprune.denoisers.host import BlockFacts, DenoiserHost
from tokenprune.denoisers.over_steps import Level
from tokenprune.denoisers.patch import DenoiserPatch, Describe
from tokenprune.denoisers.plan import Plan, solve
from tokenprune.denoisers.records import grid_of
from tokenprune.denoisers.run import UNKNOWN_STEPS, Run, forget, last_run, running
from tokenprune.denoisers.stacks import divided
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.family import Request
from tokenprune.flop_count import FlopCount
from tokenprune.kept_patches import spread
from tokenprune.method import Method

Count = Callable[[str, int, float, float], int]


@dataclass(frozen=True)
class StepPlan(Plan):
    """A plan with dense steps. dense: positions of those. count: (stack, tokens, share, position) -> tokens computed,
    where the method's own rule says it. observing: multiply-adds of what a dense step observes."""

    dense: frozenset[float] = frozenset()
    count: Count | None = None
    observing: float = 0.0

    def keep(self, position: float) -> dict[str, int]:
        return {} if position in self.dense else self.partial(position)

    def mean(self, positions: Sequence[float]) -> float:
        return super().mean(positions) + self.observing * fmean(position in self.dense for position in positions)

    def skipped(self, positions: Sequence[float]) -> dict[str, str]:
        if not self.dense.issuperset(positions):
            return super().skipped(positions)
        why = f"left alone: each of this run's steps ({len(positions)}) is a dense one"
        return dict.fromkeys(self.costs.stacks, why)

    def remedy(self, positions: Sequence[float]) -> str:
        if not self.dense.issuperset(positions):
            return super().remedy(positions)
        return "take more steps, or dense ones farther apart"

    def partial(self, position: float) -> dict[str, int]:
        """{stack: tokens computed} at a step that is not dense."""
        if self.count is None:
            return super().keep(position)
        found = {}
        for stack, cost in self.costs.stacks.items():
            strength = self.steps.strength(position, stack, stack in self.edges)
            if strength > 0.0:
                found[stack] = self.count(stack, cost.tokens, 1.0 - strength * (1.0 - self.share), position)
        return found


class CachingPatch(DenoiserPatch):
    """See `DenoiserPatch`. convolves: see `DenoiserHost`."""

    def __init__(self, describe: Describe, host: DenoiserHost, adapter: str, method: Method, request: Request) -> None:
        assert method.over_steps is not None
        self.over = method.over_steps
        self.convolves = host.convolves
        _check(host, method, request)
        super().__init__(describe, host, adapter, method, request)
        self.site = TokenSite if self.over.reuses == "tokens" else MlpSite
        if self.over.fixed and any({part.first, part.last} - {0.0, 1.0} for part in self.steps.parts):
            raise BudgetError(
                f"{method.name} computes the same tokens at every step that is not dense: its strengths in steps= are 0"
                " and 1"
            )
        stacks = divided(host, method)
        self.stacks = [stack.name for stack in stacks]
        self.attentions = {stack.name: [(block.heads, block.scale) for block in stack.blocks] for stack in stacks}
        self._forget_with()

    def _watched(self, model: nn.Module, blocks: list[BlockFacts]) -> Watched:
        return watched(model, blocks, lambda facts: None)

    def computed(self, run: Run, plan: Plan, position: float) -> dict[str, int]:
        """See `DenoiserPatch.computed`."""
        assert isinstance(plan, StepPlan)
        due = run.index == 0 or self.over.dense(run.index, len(run.positions))
        dense = due or (run.call, "filled") not in run.kept
        return {} if dense else plan.partial(position)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: the forward has ended; the prediction of tokens that were not computed is an earlier one."""
        one = running()
        super().end(model, args, output)
        if one is None or one.patch is not self or self.probe is not None or output is None:
            return None
        kept, call = one.run.kept, one.run.call
        kept[call, "filled"] = True
        if self.convolves or self.over.reuses != "tokens":
            return None
        prediction: Tensor = output[0]
        chosen = one.sets.get(self.stacks[-1])
        if chosen is not None:
            active = _active(chosen.reduction.kept, kept["tokens"], one.grid, prediction)
            prediction = torch.where(active, prediction, kept[call, "prediction"])
        kept[call, "prediction"] = prediction.detach()
        if chosen is None:
            return None
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(**{**output, next(iter(output)): prediction})

    def summary(self) -> dict[str, Any]:
        """See `DenoiserPatch.summary`."""
        data = super().summary()
        if self.latest is None:
            return data
        plan, positions = self.latest
        run = last_run(self.key)
        if run is not None and run.place is None:
            data["notes"].append(
                f"no scheduler is known here: steps are counted as those of a run of {UNKNOWN_STEPS}, and so is the"
                " cost; patch the pipeline"
            )
        if not data["places"]:
            if self.over.fixed:
                data["notes"].append("the mask and its ring cover every token: nothing is left out")
            return data
        partial = [kept for kept in map(plan.keep, positions) if kept]
        for place in data["places"]:
            counts = [kept.get(place["name"], place["tokens_in"]) for kept in partial]
            mean = fmean(counts)
            place["tokens_out"] = counts[0] if len(set(counts)) == 1 else round(mean, 1)
            place["steps"] = f"{len(partial)} of {len(positions)} steps"
        what = "computed whole" if self.over.reuses == "tokens" else "through the MLP, attention of none"
        data["notes"].append(
            f"tokens out: {what}; the others keep what an earlier step gave, all are computed at the rest"
        )
        return data

    def _solve(self, costs: DenoiserCosts, positions: tuple[float, ...], latents: Tensor) -> Plan:
        grid = (latents.shape[-2], latents.shape[-1]) if latents.ndim == 4 else None
        count = None
        if self.over.count is not None:
            count = partial(_counted, self.over.count, self.stacks, grid)
        observing = 0.0
        if self.over.observe is not None:
            observing = sum(
                _observing(self.over.observe, cost.tokens, heads, scale)
                for stack, cost in costs.stacks.items()
                for heads, scale in self.attentions[stack]
            )
        dense = frozenset(p for i, p in enumerate(positions) if i == 0 or self.over.dense(i, len(positions)))

        def plan(share: float) -> Plan:
            return StepPlan(
                costs, self.steps, share, self.edges, self.fewest, self.shares, self.barred, dense,
                count, observing,
            )  # fmt: skip

        found = solve(self.budget, plan, positions, self.method.stack_share)
        if self.budget.kind == "flops" and found.mean(positions) / costs.total < self.budget.value - 0.01:
            most = found.mean(positions) / costs.total
            raise BudgetError(
                f"{self.budget} cannot be met: with as much computed as {self.method.name} can the run costs {most:.2f}"
                f" of the unpatched one; use flops={most:.2f} or less, or more dense steps"
            )
        return found

    def _forget_with(self) -> None:
        """What a run has kept goes with the patch."""
        weakref.finalize(self, forget, self.key)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_with()

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserPatch:
        copy = super().__deepcopy__(memo)
        assert isinstance(copy, CachingPatch)
        copy._forget_with()
        return copy


def _check(host: DenoiserHost, method: Method, request: Request) -> None:
    over = method.over_steps
    assert over is not None
    blocks = [block for stack in host.stacks for block in stack.blocks]
    if over.reuses == "tokens" and host.convolves and not over.fixed:
        raise UnsupportedMethod(
            f"{method.name} takes the prediction of a token that was not computed from an earlier step, and in a U-Net"
            " no token owns a part of the prediction: convolutions follow; use it on a transformer"
        )
    if over.reuses == "tokens" and not all(block.context for block in blocks):
        name = next(block.name for block in blocks if not block.context)
        raise UnsupportedMethod(
            f"{method.name} needs self-attention in which fewer queries than keys can stand, and {name} has none that"
            " is known to be so (unfuse its projections where they are fused)"
        )
    if over.reuses == "mlp" and not all(block.mlp is not None and block.attentions for block in blocks):
        name = next(block.name for block in blocks if block.mlp is None or not block.attentions)
        raise UnsupportedMethod(
            f"{method.name} needs blocks whose attention and MLP are modules of their own, which {name} is not"
        )
    if over.observe is not None and any(block.queries is None for block in blocks):
        raise UnsupportedMethod(
            f"{method.name} needs queries and keys, which are not put out on their own (fused projections); unfuse them"
        )
    if over.count is not None and request.budget.kind == "schedule":
        raise BudgetError(f"{method.name} shares its tokens out among the blocks by its own rule; use keep= or flops=")
    if over.lacks is not None:
        raise BudgetError(over.lacks)
    if over.fixed and request.budget.kind != "default" and not request.budget.is_full:
        raise BudgetError(
            f"{method.name} computes what its mask says and takes no other budget; leave {request.budget} out"
        )


def _counted(
    count: Callable[[Level], int],
    stacks: Sequence[str],
    grid: tuple[int, int] | None,
    stack: str,
    tokens: int,
    share: float,
    position: float,
) -> int:
    """Tokens that a stack computes by the method's own rule."""
    return count(Level(tokens, grid_of(grid, tokens), share, position, stacks.index(stack), len(stacks)))


def _observing(observe: Callable[[AttentionRecord], Tensor], tokens: int, heads: int, scale: float) -> int:
    """Multiply-adds of observing one attention."""
    states = torch.empty(1, heads, tokens, round(scale**-2), device="meta")
    origin = torch.empty(1, tokens, dtype=torch.long, device="meta")
    record = AttentionRecord(states[:, 0], origin, 0, 0, 1, None, False, scale, states, states)
    with (count := FlopCount()):
        observe(record)
    return count.multiply_adds


def _active(kept: Tensor, tokens: int, grid: tuple[int, int] | None, prediction: Tensor) -> Tensor:
    """Where in a prediction the computed tokens [B, K] are, of its shape but for the channels."""
    active = torch.zeros(kept.shape[0], tokens, dtype=torch.bool, device=kept.device).scatter(1, kept, True)
    return spread(active, grid_of(grid, tokens), prediction)
