"""DenoiserPatch: one method on one denoiser, from the facts of the host to the hooks on its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokenprune.denoisers.caches import CacheWatch, Watched, submodule, watched
from tokenprune.denoisers.costs import DenoiserCosts, Probe, count_costs
from tokenprune.denoisers.host import Arguments, BlockFacts, DenoiserHost
from tokenprune.denoisers.parts import PartsSite
from tokenprune.denoisers.plan import Plan, places, solve
from tokenprune.denoisers.run import Pass, Run, finish, forget, run_of, start
from tokenprune.denoisers.site import BlockSite
from tokenprune.denoisers.stacks import barred_stacks, divided, shares_of
from tokenprune.denoisers.steps import Steps, parse_steps
from tokenprune.errors import UnsupportedModel
from tokenprune.family import Portable, Request, detach, patch_of
from tokenprune.flop_count import FlopCount, MathAttention
from tokenprune.ghost import ghost
from tokenprune.method import Method, Recover
from tokenprune.recording import Forward, Recording
from tokenprune.schedule import Layout
from tokenprune.state import in_backward

Describe = Callable[[nn.Module], DenoiserHost]


class DenoiserPatch(Portable):
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
        self.shared, self.channels = host.shared, host.channels
        self.recover: Recover = method.recover or ("similar" if host.convolves else "residual")
        stacks = divided(host, method)
        self.depths = {stack.name: len(stack.blocks) for stack in stacks}
        self.edges = frozenset(stack.name for stack in stacks if stack.edge)
        self.shares = shares_of(request.budget.shares, stacks) if request.budget.kind == "schedule" else None
        self.notes, self.barred = barred_stacks(stacks, method)
        reduced = [block for stack in stacks if stack.name not in self.barred for block in stack.blocks]
        self.caches = CacheWatch(self._watched(host.model, reduced), host.remembers, method.name)
        self.notes += host.notes
        self.pipeline = _reference(request.target)
        self.whole: tuple[Tensor, list[float]] | None = None
        self.costs: dict[Any, DenoiserCosts] = {}
        self.plans: dict[Any, Plan] = {}
        self.latest: tuple[Plan, tuple[float, ...]] | None = None
        self.probe: Probe | None = None
        self.recordings: list[Recording] = []
        self.inside: tuple[str, ...] = ()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        """Hook: a forward of the whole model starts."""
        bound = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        latents: Tensor = bound[self.latents]
        grid = (latents.shape[-2], latents.shape[-1]) if latents.ndim == 4 else None
        if self.probe is not None:
            run = Run(self.last_timestep, tuple(latents.shape), (), 1)
            start(Pass(self, run, dict(self.probe.keep), grid, reuse=False, step=torch.tensor(0)))
            return
        if not (self.active or self.recordings):
            return
        timestep = _value(bound.get(self.timestep), self.last_timestep)
        forward = Forward(grid, timestep=timestep) if self.recordings else None
        if forward is not None:
            for recording in self.recordings:
                recording.forwards.append(forward)
        if self.active:
            if in_backward():
                raise UnsupportedModel(
                    "gradient checkpointing runs the whole denoiser once more, out of the order of its run's steps;"
                    " checkpoint its blocks instead (enable_gradient_checkpointing)"
                )
            replaced = self._follow(model)
            rounding = _rounding(bound.get(self.timestep), timestep)
            run, reuse = run_of(
                self.key, latents, timestep, self.scheduled(), self.last_timestep, rounding, self.channels
            )
            self.caches.refuse(model, anew=replaced or (run.index == 0 and not reuse))
            plan = self.plan(model, bound, run.positions)
            keep = self.computed(run, plan, run.position)
            due = self.method.reuse.due(run.index) if self.method.reuse is not None else "select"
            tokens = {stack: cost.tokens for stack, cost in plan.costs.stacks.items()}
            step = torch.tensor(round(1e6 * timestep))
            start(Pass(self, run, keep, grid, reuse, step, due, tokens, forward))

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook: it has ended, by a result or an exception, which ends its run too."""
        finish(self)
        if output is None:
            forget(self.key)

    def _watched(self, model: nn.Module, blocks: list[BlockFacts]) -> Watched:
        return watched(model, blocks, partial(self.site.narrowed, method=self.method))

    def _follow(self, model: nn.Module) -> bool:
        """Attach anew where a module that has a hook inside of a block was replaced (LoRA loaded or unloaded), and
        whether it was."""
        if all(_is_hooked(model, name, self) for name in self.inside):
            return False
        detach(model, {"": self})
        self.costs.clear()
        self.plans.clear()
        attach(self.describe(model), self)
        return True

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
        if host.countable is not None:
            host.countable(copy)
        shadow = type(self)(self.describe, host, self.adapter, self.method, Request(self.budget))
        shadow.barred = self.barred
        attach(host, shadow)
        inputs = tree_map(lambda x: x.detach().to("meta") if on_meta and isinstance(x, Tensor) else x, bound)

        def run(probe: Probe) -> int:
            shadow.probe = probe
            probe.keep = {stack: keep for stack, keep in probe.keep.items() if stack not in self.barred}
            with torch.no_grad(), MathAttention(), (count := FlopCount()):
                probe.count = count
                copy(**inputs)
            return count.multiply_adds

        return count_costs(run, batch, self.fewest)

    def scheduled(self) -> list[float] | None:
        """Timesteps of the pipeline's whole run, on the model's scale; None where no pipeline was patched."""
        pipeline = self.pipeline() if self.pipeline is not None else None
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
        if not isinstance(timesteps, Tensor) or trained is None or getattr(scheduler, "num_inference_steps", 1) is None:
            return None
        if self.whole is None or self.whole[0] is not timesteps:
            scale = self.last_timestep / trained
            self.whole = timesteps, [scale * t for t in timesteps.tolist()]
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
        data.update(places=places(plan, positions), skipped=plan.skipped(positions))
        return data

    def left_behind(self) -> dict[str, Any]:
        """See `Portable`."""
        own = {"pipeline": None, "whole": None, "key": uuid4().hex, "caches": copy(self.caches)}
        return {**super().left_behind(), **own}

    def __deepcopy__(self, memo: dict[int, Any]) -> DenoiserPatch:
        other: DenoiserPatch = object.__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(self.__getstate__())
        pipeline = self.pipeline() if self.pipeline is not None else None
        copied = memo.get(id(pipeline)) if pipeline is not None else None
        other.pipeline = None if copied is None else weakref.ref(copied)
        return other


def attach(host: DenoiserHost, patch: DenoiserPatch) -> None:
    """Put the patch on the host's model.

    Raises:
        UnsupportedModel: the forward of a block is replaced or compiled in a way that is not known.
    """
    stacks = divided(host, patch.method)
    try:
        for place, stack in enumerate(stacks):
            for index, facts in enumerate(stack.blocks):
                facts.swapped._tokenprune_exchange(facts.module)  # type: ignore[attr-defined]
                patch.site(patch, stack, index, place, len(stacks)).attach(facts)
    except UnsupportedModel:
        detach(host.model, {"": patch})
        raise
    blocks = {id(facts.module) for stack in stacks for facts in stack.blocks}
    names = [name for name, module in host.model.named_modules() if id(module) not in blocks]
    patch.inside = tuple(name for name in names if _is_hooked(host.model, name, patch))
    host.model.register_forward_pre_hook(patch.begin, with_kwargs=True, prepend=True)
    host.model.register_forward_hook(patch.end, always_call=True)


def _is_hooked(model: nn.Module, name: str, patch: DenoiserPatch) -> bool:
    """Whether there is a module of that name, with a hook of the patch."""
    module = submodule(model, name)
    return module is not None and any(
        patch_of(hook) is patch for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _of_one(x: Tensor, batch: int) -> tuple[str | int, ...]:
    """The shape of a tensor, without the size of the batch where that comes first."""
    return ("batch", *x.shape[1:]) if x.shape[:1] == (batch,) else tuple(x.shape)


def _value(timestep: Any, unknown: float) -> float:
    """The timestep of a forward as a number; of several the noisiest."""
    if isinstance(timestep, Tensor):
        return unknown if timestep.device.type == "meta" else float(timestep.max())
    return unknown if timestep is None else float(timestep)


def _rounding(timestep: Any, value: float) -> float:
    """How far a timestep may be from the scheduler's in its dtype: rounded twice, at the cast and by a quotient."""
    floating = isinstance(timestep, Tensor) and timestep.is_floating_point()
    return float(torch.finfo(timestep.dtype).eps) * abs(value) if floating else 0.0


def _reference(target: object) -> weakref.ref[Any] | None:
    return weakref.ref(target) if hasattr(target, "scheduler") and not isinstance(target, nn.Module) else None
