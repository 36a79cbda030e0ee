"""DenoiserPatch: one method on one denoiser, from the facts of the host to the hooks on its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.budget import Budget
from tokenprune.denoisers.costs import DenoiserCosts, Probe, count_costs
from tokenprune.denoisers.host import Arguments, DenoiserHost, Stack
from tokenprune.denoisers.parts import PartsSite, refuse_parts
from tokenprune.denoisers.plan import Plan, solve
from tokenprune.denoisers.run import Pass, Run, finish, position_of, positions_from, run_of, start
from tokenprune.denoisers.site import BlockSite
from tokenprune.denoisers.steps import Steps, parse_steps
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.family import Request
from tokenprune.ghost import ghost
from tokenprune.method import Method
from tokenprune.recording import Recording
from tokenprune.schedule import Layout

Describe = Callable[[nn.Module], DenoiserHost]


class DenoiserPatch:
    """What a patch knows for as long as it is on: plain data, no module.

    describe: a model -> its facts (of the adapter). active: whether anything is reduced (not at a budget of 1.0). site:
    what stands in front of its blocks.
    """

    def __init__(self, describe: Describe, host: DenoiserHost, adapter: str, method: Method, request: Request) -> None:
        self.key = uuid4().hex
        self.describe = describe
        self.adapter = adapter
        self.method = method
        self.site: type[BlockSite] = PartsSite if method.parts else BlockSite
        self.budget = request.budget
        self.steps: Steps = method.steps if request.steps is None else parse_steps(request.steps)
        self.active = not request.budget.is_full
        self.arguments, self.latents, self.timestep = host.arguments, host.latents, host.timestep
        self.last_timestep = host.last_timestep
        self.shared = host.shared
        self.recover = method.recover or ("similar" if host.convolves else "residual")
        stacks = divided(host, method)
        self.edges = frozenset(stack.name for stack in stacks if stack.edge)
        self.shares = _shares(request.budget.shares, stacks) if request.budget.kind == "schedule" else None
        self.notes, self.barred = _barred(stacks, method)
        self.notes += host.notes
        self.pipeline = _reference(request.target)
        self.whole: tuple[Tensor, list[float]] | None = None
        self.costs: dict[Any, DenoiserCosts] = {}
        self.plans: dict[Any, Plan] = {}
        self.latest: tuple[Plan, tuple[float, ...]] | None = None
        self.probe: Probe | None = None
        self.recordings: list[Recording] = []

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Hook: a forward of the whole model starts."""
        bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        latents: Tensor = bound[self.latents]
        grid = (latents.shape[-2], latents.shape[-1]) if latents.ndim == 4 else None
        if self.probe is not None:
            run = Run(self.last_timestep, tuple(latents.shape), (), 1)
            start(Pass(self, run, dict(self.probe.keep), grid, reuse=False, step=torch.tensor(0)))
        elif self.active:
            timestep, whole = _value(bound.get(self.timestep), self.last_timestep), self._scheduled()
            run, reuse = run_of(self.key, latents, timestep, whole, self.last_timestep)
            plan = self.plan(model, bound, run.positions)
            keep = self.computed(run, plan, position_of(timestep, whole, self.last_timestep))
            due = self.method.reuse.due(run.index) if self.method.reuse is not None else "select"
            start(Pass(self, run, keep, grid, reuse, torch.tensor(round(1e6 * timestep)), due))

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: it has ended, by a result or an exception."""
        finish(self)

    def computed(self, run: Run, plan: Plan, position: float) -> dict[str, int]:
        """{stack: tokens computed} in the forward that starts; those that are left whole are not in it."""
        return plan.keep(position)

    def mark(self, stack: str, point: str, x: Tensor) -> None:
        """A point of a counted forward."""
        if self.probe is not None:
            self.probe.mark(stack, point, x)

    def plan(self, model: nn.Module, bound: Arguments, positions: tuple[float, ...]) -> Plan:
        """The plan for a run of these positions with images of these shapes, solved once for each, whatever the batch.

        Raises:
            BudgetError: the budget cannot be met at this size or in such a run.
        """
        batch = bound[self.latents].shape[0]
        size = tuple((name, _of_one(x, batch)) for name, x in sorted(bound.items()) if isinstance(x, Tensor))
        if (size, positions) not in self.plans:
            latents = bound[self.latents]
            if size not in self.costs:
                self.costs[size] = self._count(model, bound)
            self.plans[size, positions] = self._solve(self.costs[size], positions, latents)
        self.latest = self.plans[size, positions], positions
        return self.latest[0]

    def fewest(self, tokens: int) -> int:
        """The fewest of `tokens` that the method leaves."""
        return self.method.schedule.fewest(tokens, Layout(1, 0))

    def _solve(self, costs: DenoiserCosts, positions: tuple[float, ...], latents: Tensor) -> Plan:
        shares, barred = self.shares, dict(self.barred)
        if self.method.levels is not None and self.budget.kind != "schedule":
            counts = sorted({cost.tokens for cost in costs.stacks.values()}, reverse=True)
            levels = self.method.levels(latents.shape[-2] * latents.shape[-1] if latents.ndim == 4 else None, counts)
            touched = ", ".join(f"{n:,}" for n in sorted(levels, reverse=True)) or "none"
            for stack, cost in costs.stacks.items():
                if cost.tokens not in levels:
                    barred.setdefault(
                        stack, f"left alone: of {cost.tokens:,} tokens, the method is on at levels of {touched}"
                    )
            if self.budget.kind in ("default", "own"):
                shares = {stack: levels[c.tokens] for stack, c in costs.stacks.items() if c.tokens in levels}

        def plan(share: float) -> Plan:
            return Plan(costs, self.steps, share, self.edges, self.fewest, shares, barred)

        return solve(self.budget, plan, positions, self.method.stack_share)

    def _count(self, model: nn.Module, bound: Arguments) -> DenoiserCosts:
        batch = bound[self.latents].shape[0]
        try:
            return self._counted(model, bound, batch, on_meta=True)
        except (NotImplementedError, RuntimeError):  # what reads values cannot run without them: one forward more
            return self._counted(model, bound, batch, on_meta=False)

    def _counted(self, model: nn.Module, bound: Arguments, batch: int, *, on_meta: bool) -> DenoiserCosts:
        copy = ghost(model, on_meta=on_meta)
        host = self.describe(copy)
        shadow = type(self)(self.describe, host, self.adapter, self.method, Request(self.budget))
        shadow.barred = self.barred
        attach(host, shadow)
        inputs = tree_map(lambda x: x.detach().to("meta") if on_meta and isinstance(x, Tensor) else x, bound)

        def run(probe: Probe) -> int:
            shadow.probe = probe
            probe.keep = {stack: keep for stack, keep in probe.keep.items() if stack not in self.barred}
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                probe.counter = counter
                copy(**inputs)
            return int(counter.get_total_flops()) // 2

        return count_costs(run, batch, self.fewest)

    def _scheduled(self) -> list[float] | None:
        """Timesteps of the pipeline's whole run, on the model's scale; None where no pipeline was patched."""
        pipeline = self.pipeline() if self.pipeline is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or getattr(scheduler, "num_inference_steps", 1) is None:
            return None
        if self.whole is None or self.whole[0] is not timesteps:
            scale = self.last_timestep / scheduler.config.num_train_timesteps  # type: ignore[union-attr]
            self.whole = timesteps, list(dict.fromkeys(scale * t for t in timesteps.tolist()))
        return self.whole[1]

    def summary(self) -> dict[str, Any]:
        """The data of the report; before the first forward of a size that is not known, without numbers."""
        data: dict[str, Any] = {
            "method": self.method.name,
            "paper": self.method.paper,
            "family": self.adapter,
            "budget": str(self.budget),
            "flops_before": 0,
            "flops_after": 0,
            "flops_ratio": 1.0,
            "places": [],
            "skipped": dict(self.barred),
            "notes": list(self.notes),
        }
        if not self.active:
            return data
        if self.latest is None:
            data["notes"].append("the budget is solved at the first forward: sizes are not known before")
            return data
        plan, positions = self.latest
        after = plan.mean(positions)
        data.update(
            flops_before=round(plan.costs.total), flops_after=round(after), flops_ratio=after / plan.costs.total
        )
        data.update(places=_places(plan, positions), skipped=plan.skipped(positions))
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recordings": [], "pipeline": None, "whole": None, "key": uuid4().hex}

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserPatch:
        copy: DenoiserPatch = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__getstate__())
        return copy


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> DenoiserPatch:
    """The patch of a denoiser, its budget solved where the usual input is known; nothing is attached yet.

    Raises:
        UnsupportedMethod: the method needs what a denoiser does not have.
        BudgetError: the budget cannot be met.
    """
    host = describe(model)
    if request.positions is not None:
        raise UnsupportedMethod("positions= is of the tokens of a prompt, and a denoiser has none; leave it out")
    if method.adaptive:
        raise UnsupportedMethod(
            f"{method.name} keeps a different number of tokens in each image, which no denoiser runs"
        )
    if method.proportional:
        raise UnsupportedMethod(
            f"{method.name} adds log(size) to the attention logits, and these attentions take no bias;"
            f" patch(pipe, {method.name!r}, proportional=False, ...) works"
        )
    missing = method.needs - {"queries", "keys", "cross", "stacks", "grid", "steps"}
    if missing:
        raise UnsupportedMethod(f"{method.name} needs {', '.join(sorted(missing))}, which a denoiser does not expose")
    if request.budget.kind == "tokens":
        raise BudgetError(f"{request.budget}: behind each stack all tokens are there again; use keep= or flops=")
    _check_own(method, request.budget)
    _check_shares(method, request.budget)
    patch = _kind(method)(describe, host, adapter, method, request)
    if patch.active and len(patch.barred) == len(divided(host, method)):
        raise UnsupportedMethod(
            f"{method.name} can be applied nowhere: " + "; ".join(map(" ".join, patch.barred.items()))
        )
    if patch.active and host.example is not None:
        whole = patch._scheduled()
        first = whole[0] if whole else patch.last_timestep
        patch.plan(model, host.example(), positions_from(first, whole, patch.last_timestep))
    return patch


def _kind(method: Method) -> type[DenoiserPatch]:
    if method.over_steps is None:
        return DenoiserPatch
    from tokenprune.denoisers.caching import CachingPatch  # it builds on this module

    return CachingPatch


def _check_own(method: Method, budget: Budget) -> None:
    """Raise where the method's own option says how many tokens leave the blocks of an image tower."""
    ignored = budget.option == "r" or (budget.option == "rate" and budget.value != method.stack_share)
    if budget.kind == "own" and ignored:
        raise BudgetError(
            f"{budget} counts tokens that leave the blocks of an image tower, and behind a denoiser's stacks all are"
            f" there again; patch(pipe, {method.name!r}, keep={method.stack_share:g}) works"
        )


def attach(host: DenoiserHost, patch: DenoiserPatch) -> None:
    """Put the patch on the host's model."""
    stacks = divided(host, patch.method)
    for place, stack in enumerate(stacks):
        for index, facts in enumerate(stack.blocks):
            facts.swapped._tokenprune_exchange(facts.module)  # type: ignore[attr-defined]
            patch.site(patch, stack, index, place, len(stacks)).attach(facts)
    host.model.register_forward_pre_hook(patch.begin, with_kwargs=True, prepend=True)
    host.model.register_forward_hook(patch.end, always_call=True)


def divided(host: DenoiserHost, method: Method) -> list[Stack]:
    """The host's stacks, a mere row of blocks divided into stacks of the method's depth."""
    if not host.divisible:
        return list(host.stacks)
    stacks = []
    for row in host.stacks:
        for first in range(0, len(row.blocks), method.stack_depth):
            blocks = row.blocks[first : first + method.stack_depth]
            stacks.append(Stack(f"{row.name}.{first}-{first + len(blocks) - 1}", blocks, row.edge))
    return stacks


def _barred(stacks: list[Stack], method: Method) -> tuple[list[str], dict[str, str]]:
    """What the report says of stacks one block deep, and those that the method cannot work in."""
    if method.over_steps is not None:
        return [], {}
    if method.parts:
        refused = {stack.name: refuse_parts(stack, method) for stack in stacks}
        return [], {name: f"left alone: {why}" for name, why in refused.items() if why is not None}
    barred = {}
    if "cross" in method.needs:
        barred = {s.name: "left alone: it has no cross-attention" for s in stacks if s.blocks[0].cross is None}
    shallow = [stack for stack in stacks if len(stack.blocks) == 1 and stack.name not in barred]
    if not shallow or not method.needs & {"queries", "keys", "cross"}:
        return [], barred
    for stack in shallow:
        if "cross" in method.needs:
            barred[stack.name] = "left alone: one block deep, and its cross-attention is not known before it"
        elif stack.blocks[0].before is None:
            barred[stack.name] = "left alone: one block deep, and its queries are not known before it"
    scored = [stack.name for stack in shallow if stack.name not in barred]
    notes = [f"one block deep, scored before the block from its own queries and keys: {', '.join(scored)}"]
    return notes if scored else [], barred


def _check_shares(method: Method, budget: Budget) -> None:
    many = 10**6
    least = method.schedule.fewest(many, Layout(1, 0)) / many
    asked = [budget.value] if budget.kind == "keep" else [share for _, share in budget.shares]
    if any(share < least for share in asked):
        raise BudgetError(
            f"{budget} asks {method.name} to compute fewer than the {least:.3g} of a stack's tokens that it must leave;"
            f" use keep={least:.3g} or more"
        )


def _shares(asked: tuple[tuple[str, float], ...], stacks: list[Stack]) -> dict[str, float]:
    names = [stack.name for stack in stacks]
    shares = {}
    for place, share in asked:
        name = names[int(place)] if place.lstrip("-").isdigit() and -len(names) <= int(place) < len(names) else place
        if name not in names:
            raise BudgetError(f"schedule names the stack {place!r}; the model has {', '.join(names)}")
        shares[name] = share
    return shares


def _places(plan: Plan, positions: tuple[float, ...]) -> list[dict[str, Any]]:
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


def _of_one(x: Tensor, batch: int) -> tuple[str | int, ...]:
    """The shape of a tensor, without the size of the batch where that comes first."""
    return ("batch", *x.shape[1:]) if x.shape[:1] == (batch,) else tuple(x.shape)


def _value(timestep: Any, unknown: float) -> float:
    """The timestep of a forward as a number; of several the noisiest."""
    if isinstance(timestep, Tensor):
        return unknown if timestep.device.type == "meta" else float(timestep.max())
    return unknown if timestep is None else float(timestep)


def _reference(target: object) -> weakref.ref[Any] | None:
    return weakref.ref(target) if hasattr(target, "scheduler") and not isinstance(target, nn.Module) else None
