"""What a comparison compares: the unpatched model, each method at each budget, and the baselines that always belong."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.budget import BUDGETS, parse_budget
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod
from tokenprune.evals.flops import multiply_adds
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.smaller_input import FILTERS, resize, smaller_input
from tokenprune.registry import make_method, method_names

T = TypeVar("T")
Budget = Mapping[str, Any]
"""The budget of one row, as keywords of `tokenprune.patch`: {"flops": 0.6}, or {} for the method's own default."""

DROP_BASELINES = ("random", "uniform")
UNPATCHED = "unpatched"
SMALLER_INPUT = "smaller input"
FEWER_STEPS = "fewer steps"
FIRST_STEPS = "fewer steps, the first ones"
UNIPC_STEPS = "fewer steps, UniPC"
FEWER = (FEWER_STEPS, FIRST_STEPS, UNIPC_STEPS)


def is_unpatched(method: str) -> bool:
    """Whether rows of that name carry no patch: the model as it is, on a smaller input, or with fewer steps."""
    return method in (UNPATCHED, *FEWER) or method.split(",")[0] == SMALLER_INPUT


def is_baseline(method: str) -> bool:
    """Whether rows of that name are there to be beaten: those without a patch, and those that drop without a score."""
    return is_unpatched(method) or method in DROP_BASELINES


@dataclass(frozen=True)
class Arm:
    """One row of a comparison. `model` is None where it could not be built, and `note` then says why.

    size: (height, width) in pixels that images are brought to before the forward by `filter`, None for as they are.
    flops: multiply-adds of one image. flops_ratio: those over the unpatched model's. tokens: prunable tokens that leave
    the last place, of the example images.
    """

    method: str
    budget: str
    model: nn.Module | None
    size: tuple[int, int] | None = None
    filter: str = FILTERS[0]
    flops: int | None = None
    flops_ratio: float | None = None
    tokens: int | None = None
    note: str | None = None

    @property
    def is_patched(self) -> bool:
        """Whether `model` carries a patch, and so has a report."""
        return self.model is not None and not is_unpatched(self.method)

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as this arm's model takes them."""
        return images if self.size is None else resize(images, self.size, self.filter)


class MakeArm(Protocol):
    """A method at a budget as an `Arm`; required: raise where the method does not fit."""

    def __call__(self, name: str, budget: Budget, *, required: bool) -> Arm: ...


def build_arms(
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    baselines: bool = True,
    dense: bool = False,
    make: MakeArm | None = None,
) -> list[Arm]:
    """The arms of a comparison on `images` [B, C, H, W], the unpatched model first; `model` itself is left as it is.

    All arms share the weights of `model`. `methods=None` takes every method that fits the model. With `baselines`,
    random, uniform and a smaller input of equal FLOPs are added at each budget. A budget that a method cannot meet
    becomes an arm with a note; so does a method that was not asked for by name and turns out not to fit. `dense`: patch
    tokens are read behind the last block, so a budget is met with all of it computed. make: builds the arm of a method
    in the place of `method_arm`, as `tokenprune.evals.calibrated_arms` does.

    Raises TokenPruneError for a method named in `methods` that is unknown or does not fit, and for a malformed budget.
    """
    for budget in budgets:
        parse_budget(**{kind: value for kind, value in budget.items() if kind in BUDGETS})
    base = tokenprune.unpatch(shared_copy(model)).eval()
    names = comparable(base) if methods is None else list(methods)
    if baselines:
        names += [name for name in DROP_BASELINES if name not in names]
    make = make or partial(method_arm, base, images, dense=dense)
    arms = [Arm(UNPATCHED, "", base, flops=multiply_adds(base, images), flops_ratio=1.0)]
    for budget in budgets:
        rows = [make(name, budget, required=methods is not None) for name in names]
        arms += rows
        if baselines:
            arms.append(smaller_arm(base, images, budget, [r.flops_ratio for r in rows if r.flops_ratio is not None]))
    return arms


def comparable(target: object) -> list[str]:
    """Names of the methods that fit `target`, but for those that act in training alone."""
    return [method.name for method in tokenprune.methods(target) if not method.training_only]


def refuse_training_only(name: str) -> None:
    """Raise UnsupportedMethod for a method that leaves a model in eval mode as it is."""
    if name in method_names() and make_method(name, {}).training_only:
        raise UnsupportedMethod(
            f"{name} acts in training alone, and in eval mode there is nothing to compare; `python -m"
            " tokenprune.evals.training_speed` times its steps"
        )


def budget_label(budget: Budget) -> str:
    """`flops=0.6` for {"flops": 0.6}, `default` for {}."""
    return ", ".join(f"{name}={value}" for name, value in budget.items()) or "default"


def tokens_left(model: nn.Module) -> int | None:
    """Prunable tokens that left the last place in the last forward of a patched model."""
    places = tokenprune.report(model).to_dict()["places"]
    return places[-1]["tokens_out"] if places else None


def method_arm(base: nn.Module, images: Tensor, name: str, budget: Budget, *, required: bool, dense: bool) -> Arm:
    """`base` with a method at a budget, without a model and with a note where that cannot be.

    required: raise where the method does not fit. The rest as in `build_arms`.
    """
    label = budget_label(budget)
    model = shared_copy(base)
    try:
        refuse_training_only(name)
        tokenprune.patch(model, name, **budget, prefix_only_last=not dense)
        with torch.inference_mode():
            model(images)
        report = tokenprune.report(model).to_dict()
    except TokenPruneError as error:
        if required and not isinstance(error, BudgetError):
            raise
        return Arm(name, label, None, note=str(error))
    return Arm(
        name,
        label,
        model,
        flops=report["flops_after"],
        flops_ratio=report["flops_ratio"],
        tokens=tokens_left(model),
    )


def smaller_arm(base: nn.Module, images: Tensor, budget: Budget, ratios: Sequence[float] = ()) -> Arm:
    """`base` on smaller pictures, of the FLOPs that are the budget, or of the median that methods need, `ratios`, where
    it is another one."""
    label = budget_label(budget)
    target = budget.get("flops") or (statistics.median(ratios) if ratios else None)
    if target is None:
        return Arm(SMALLER_INPUT, label, None, note="no method could be run at this budget: nothing to match")
    try:
        found = smaller_input(base, images, target)
    except TokenPruneError as error:
        return Arm(SMALLER_INPUT, label, None, note=str(error))
    note = f"{found.size[0]}x{found.size[1]} pixels"
    return Arm(
        SMALLER_INPUT, label, found.model, found.size, flops=found.flops, flops_ratio=found.flops_ratio, note=note
    )


def filtered(arm: Arm, by: str) -> Arm:
    """`arm`, of a smaller input, with pictures shrunk by another of FILTERS."""
    return replace(arm, method=f"{SMALLER_INPUT}, {by}", filter=by)


def runnable(arms: Sequence[Arm], others: Sequence[T]) -> Iterator[tuple[Arm, nn.Module, T]]:
    """(arm, model, other) of the arms that have a model, `others` going along with `arms`."""
    for arm, other in zip(arms, others, strict=True):
        if arm.model is not None:
            yield arm, arm.model, other
