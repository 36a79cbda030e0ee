"""Arms of adaptive methods, which keep what each image needs, at a budget in the mean over images without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.calibration import Costs, threshold_at
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Arm, Budget, budget_label, method_arm
from tokenprune.registry import has_threshold, make_method

MET = 0.01
"""How near the mean FLOPs of a bound have to be to what was asked for."""

HALVINGS = 8


@dataclass(frozen=True)
class Calibrated:
    """Makes the arms of `base` as `tokenprune.evals.arms.method_arm` does, whose budget in `flops` adaptive methods
    meet too, in the mean over images without labels.

    example: images [B, C, H, W] on which other budgets are solved. unlabelled: [N, C, H, W]. batch_size: of the
    forwards over them. dense: patch tokens are read behind the last block. What a setting costs is counted once for
    all budgets.
    """

    base: nn.Module
    example: Tensor
    unlabelled: Tensor
    batch_size: int
    dense: bool
    costs: dict[str, Costs] = field(default_factory=dict)
    bounds: dict[tuple[str, float | None], tuple[float, Arm]] = field(default_factory=dict)

    def arm(self, name: str, budget: Budget, *, required: bool) -> Arm:
        """A method at a budget; required: raise where the method does not fit.

        An adaptive method at {"flops": share} gets the threshold, or without one the bound on what is kept (`keep`), at
        which the mean over the unlabelled images is that share; its note says which.
        """
        if set(budget) != {"flops"} or not make_method(name, {}).adaptive:
            return self._patched(name, budget, required)
        brought = self._thresholded if has_threshold(name) else self._bounded
        return replace(brought(name, budget["flops"], required), budget=budget_label(budget))

    def _thresholded(self, name: str, flops: float, required: bool) -> Arm:
        if name not in self.costs:
            self.costs[name] = Costs(self.base, self.unlabelled, name, self.batch_size)
        try:
            found = threshold_at(self.costs[name], flops, near=MET / 2)
        except TokenPruneError as error:
            return Arm(name, "", None, note=str(error))
        arm = self._patched(name, {"schedule": found}, required)
        return self._found(arm, f"threshold={found.options['threshold']:.4f}")

    def _bounded(self, name: str, flops: float, required: bool) -> Arm:
        """The bound that is nearest."""
        tried = list(self._bounds(name, flops, required))
        error, cost, budget, arm = min(tried, key=lambda each: each[0])
        if arm.model is None:
            return arm
        if error > MET:
            most = f"nearest is {budget_label(budget)}, at which" if budget else "it keeps so few by itself that"
            note = f"flops={flops:g} is met by no bound on what is kept: {most} it costs {cost:.2f}"
            return Arm(name, "", None, note=note)
        return self._found(arm, budget_label(budget))

    def _bounds(self, name: str, flops: float, required: bool) -> Iterator[tuple[float, float, Budget, Arm]]:
        """(error, cost, budget, arm) of the bounds that are tried: none at all, then halved in on."""
        low, high = 0.0, 1.0
        budget: Budget = {}
        for _ in range(HALVINGS):
            cost, arm = self._bound(name, budget, required)
            yield abs(cost - flops), cost, budget, arm
            if abs(cost - flops) <= MET / 2 or (not budget and cost < flops):
                return
            if budget:
                low, high = (budget["keep"], high) if cost < flops else (low, budget["keep"])
            budget = {"keep": (low + high) / 2}

    def _bound(self, name: str, budget: Budget, required: bool) -> tuple[float, Arm]:
        """What a method costs with a bound on what is kept, and that arm; 0 where it does not fit."""
        key = (name, budget.get("keep"))
        if key not in self.bounds:
            arm = self._patched(name, budget, required)
            self.bounds[key] = (0.0 if arm.model is None else self._mean_flops(arm.model), arm)
        return self.bounds[key]

    def _patched(self, name: str, budget: Budget, required: bool) -> Arm:
        return method_arm(self.base, self.example, name, budget, required=required, dense=self.dense)

    def _found(self, arm: Arm, what: str) -> Arm:
        return replace(arm, note=arm.note or f"{what}, found on {len(self.unlabelled)} images without labels")

    def _mean_flops(self, model: nn.Module) -> float:
        """Multiply-adds over the unpatched model's in the mean over the unlabelled images."""
        total = 0.0
        for batch in torch.split(self.unlabelled, self.batch_size):
            with torch.inference_mode():
                model(batch)
            total += len(batch) * float(tokenprune.report(model).to_dict()["flops_ratio"])
        return total / len(self.unlabelled)
