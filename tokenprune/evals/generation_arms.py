"""What a comparison of diffusion models compares: unpatched, each method at each budget, and fewer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusers import UniPCMultistepScheduler
from torch import Tensor

import tokenprune
from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.evals.arms import (
    DROP_BASELINES,
    FEWER_STEPS,
    FIRST_STEPS,
    UNIPC_STEPS,
    UNPATCHED,
    Arm,
    Budget,
    budget_label,
    comparable,
    refuse_training_only,
    tokens_left,
)
from tokenprune.evals.digits_pipelines import GUIDANCE, DigitsPipeline, pipeline_of
from tokenprune.evals.drawing_orders import Orders
from tokenprune.evals.flops import count_multiply_adds
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import Interval


@dataclass(frozen=True)
class GenerationArm(Arm):
    """An arm that draws: `model` is the denoiser of `pipe`, which takes `steps` steps at `guidance`.

    flops: multiply-adds of one image over the whole run, both branches of the guidance. sigmas: noise levels of the
    steps where they are not even.
    """

    pipe: DigitsPipeline | None = None
    steps: int = 0
    guidance: float = GUIDANCE
    sigmas: tuple[float, ...] | None = None

    def draw(self, orders: Orders) -> Tensor:
        """Pictures [N, 3, 36, 36] in [0, 1]."""
        assert self.pipe is not None, "only arms that were built draw"
        pictures: Tensor = self.pipe(
            orders.labels,
            centres=orders.centres,
            num_inference_steps=self.steps,
            sigmas=self.sigmas,
            guidance_scale=self.guidance,
            latents=orders.noise,
        )
        return pictures


def generation_arms(
    pipe: DigitsPipeline,
    orders: Orders,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    steps: int,
    guidance: float = GUIDANCE,
    baselines: bool = True,
) -> list[GenerationArm]:
    """The arms of a comparison, the unpatched pipeline first; `pipe` itself is left as it is.

    orders: a few, to solve the budgets on. `methods=None` takes every
    method that fits. With `baselines`, random, uniform and a run of fewer steps at equal FLOPs are added at each
    budget. A budget that cannot be met becomes an arm with a note, as in `tokenprune.evals.arms.build_arms`.

    Raises TokenPruneError for a method named in `methods` that is unknown or does not fit.
    """
    first = unpatched_arm(pipe, orders, steps=steps, guidance=guidance)
    assert first.pipe is not None
    names = comparable(first.pipe) if methods is None else list(methods)
    if baselines:
        names += [name for name in DROP_BASELINES if name not in names]
    arms = [first]
    for budget in budgets:
        rows = [method_arm(first, orders, name, budget, required=name in (methods or ())) for name in names]
        arms += rows
        ratios = [row.flops_ratio for row in rows if row.flops_ratio is not None]
        target = budget.get("flops") or (statistics.median(ratios) if ratios else None)
        if baselines and target is not None:
            arms.append(fewer_steps(first, max(1, round(steps * target)), budget_label(budget)))
    return arms


def unpatched_arm(pipe: DigitsPipeline, orders: Orders, *, steps: int, guidance: float = GUIDANCE) -> GenerationArm:
    """A copy of `pipe` that shares its weights and carries no patch; its cost is counted on one order."""
    base = pipeline_of(tokenprune.unpatch(shared_copy(pipe.denoiser)))
    one_step = GenerationArm(UNPATCHED, "", base.denoiser, pipe=base, steps=1, guidance=guidance)
    flops = steps * count_multiply_adds(lambda: one_step.draw(orders.first(1)))
    return replace(one_step, flops=flops, flops_ratio=1.0, steps=steps)


def fewer_steps(base: GenerationArm, steps: int, budget: str) -> GenerationArm:
    """The unpatched arm `base` with `steps` steps, in the rows of `budget`."""
    assert base.flops is not None
    ratio = steps / base.steps
    return replace(
        base,
        method=FEWER_STEPS,
        budget=budget,
        flops=round(base.flops * ratio),
        flops_ratio=ratio,
        note=f"{steps} of {base.steps} steps",
        steps=steps,
    )


def first_steps(base: GenerationArm, steps: int) -> GenerationArm:
    """The first `steps` of the unpatched `base`, the last of which goes all the way: fewer steps, where they matter."""
    sigmas = tuple(1 - step / base.steps for step in range(steps))
    arm = fewer_steps(base, steps, "")
    return replace(arm, method=FIRST_STEPS, note=f"the first {steps} of {base.steps} steps", sigmas=sigmas)


def unipc_steps(base: GenerationArm, steps: int, budget: str) -> GenerationArm:
    """The unpatched `base` with `steps` even steps of UniPC (Zhao et al., NeurIPS 2023), which uses those before."""
    assert base.model is not None
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = pipeline_of(shared_copy(base.model), scheduler)
    arm = fewer_steps(base, steps, budget)
    return replace(arm, method=UNIPC_STEPS, model=pipe.denoiser, pipe=pipe)


def equal_time(arms: Sequence[GenerationArm], speedups: Sequence[Interval | None]) -> list[GenerationArm]:
    """Runs of fewer steps that take as long as the patched ones of `arms`, each number of steps once.

    speedups: measured, of each arm; None where it was not.
    """
    taken = {(arm.budget, arm.steps) for arm in arms if arm.method == FEWER_STEPS}
    found: list[GenerationArm] = []
    for arm, speedup in zip(arms, speedups, strict=True):
        if speedup is None or not arm.is_patched:
            continue
        steps = min(arms[0].steps, max(1, math.floor(arms[0].steps / speedup.estimate + 0.5)))
        if steps < arms[0].steps and (arm.budget, steps) not in taken:
            taken.add((arm.budget, steps))
            found.append(fewer_steps(arms[0], steps, arm.budget))
    return found


def method_arm(base: GenerationArm, orders: Orders, name: str, budget: Budget, *, required: bool) -> GenerationArm:
    """A copy of the unpatched `base` with a patch, or where it cannot be built none and the reason.

    Raises TokenPruneError where the method is `required` and is unknown or does not fit.
    """
    label = budget_label(budget)
    assert base.model is not None
    assert base.flops is not None
    pipe = pipeline_of(shared_copy(base.model))
    arm = replace(base, method=name, budget=label, model=pipe.denoiser, pipe=pipe)
    try:
        refuse_training_only(name)
        tokenprune.patch(pipe, name, **budget)
        arm.draw(orders)
        report = tokenprune.report(pipe).to_dict()
    except TokenPruneError as error:
        if required and not isinstance(error, BudgetError):
            raise
        return replace(arm, model=None, pipe=None, flops=None, flops_ratio=None, note=str(error))
    ratio = report["flops_ratio"]
    return replace(arm, flops=round(base.flops * ratio), flops_ratio=ratio, tokens=tokens_left(pipe.denoiser))
