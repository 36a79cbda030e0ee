"""What a comparison of vision-language models compares: unpatched, and methods at budgets, with either positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.evals.arms import DROP_BASELINES, UNPATCHED, Arm, Budget, budget_label
from tokenprune.evals.placed_digits import GRID
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.registry import make_method

ORIGINAL, REINDEX = "original", "reindex"
# What else of a method is compared, in words: the option that makes it so. A stride as long as the image leaves one
# token to the uniform grid, so that the score alone decides.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "fopru": {"rows": {"strategy": "row"}, "class token": {"query": "cls"}},
    "visionzip": {"all layers": {"start_layer": 0}},
    "prumerge": {"spatial": {"spatial": True}, "all layers": {"start_layer": 0}},
    "feather": {
        "with rotary": {"rotary": True},
        "no grid": {"stride": GRID},
        "no grid, with rotary": {"stride": GRID, "rotary": True},
    },
}
YARDSTICK = "fastv"


@dataclass(frozen=True)
class LvlmArm(Arm):
    """One row. positions: of the visual tokens that are kept, "" for the unpatched model."""

    positions: str = ""


def lvlm_arms(
    model: nn.Module,
    example: Mapping[str, Tensor],
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"keep": 0.25},),
    *,
    baselines: bool = True,
) -> list[LvlmArm]:
    """The arms of a comparison, the unpatched model first; `model` itself is left as it is.

    example: arguments of a forward. methods: None for all that fit. Methods that work behind the tower come twice, with
    original positions and counted anew. Those that work between layers have the budget if it is of `flops`; else they
    get the FLOPs of `fastv` with that share, so that they are compared at equal FLOPs. With `baselines`, random and
    uniform are added.

    A budget that a method cannot meet becomes an arm with a note; so does a method that was not asked for by name and
    turns out not to fit.
    """
    base = tokenprune.unpatch(shared_copy(model)).eval()
    names = [method.name for method in tokenprune.methods(base)] if methods is None else list(methods)
    if baselines:
        names += [name for name in DROP_BASELINES if name not in names]
    arms = [LvlmArm(UNPATCHED, "", base, flops_ratio=1.0)]
    for budget in budgets:
        equal = budget if "flops" in budget else {"flops": _yardstick(base, example, budget)}
        for name in names:
            inside = make_method(name, {}).inside_model is not None
            for words, options in {"": dict[str, Any](), **VARIANTS.get(name, {})}.items():
                label = f"{name}, {words}" if words else name
                for positions in (ORIGINAL,) if inside else (ORIGINAL, REINDEX):
                    given = {**options, **(equal if inside and name != YARDSTICK else budget)}
                    if not inside:
                        given["positions"] = positions
                    arms.append(_arm(base, example, name, given, methods is not None, label, positions, budget))
    return arms


def _yardstick(base: nn.Module, example: Mapping[str, Tensor], budget: Budget) -> float:
    """The share of the unpatched model's FLOPs that `YARDSTICK` has at a budget."""
    with tokenprune.patched(shared_copy(base), YARDSTICK, **budget) as model, torch.inference_mode():
        model(**example)
        ratio: float = tokenprune.report(model).to_dict()["flops_ratio"]
    return round(ratio, 4)


def _arm(
    base: nn.Module,
    example: Mapping[str, Tensor],
    name: str,
    arguments: Mapping[str, Any],
    required: bool,
    label: str,
    positions: str,
    budget: Budget,
) -> LvlmArm:
    model, words = shared_copy(base), budget_label(budget)
    if "flops" in arguments and "flops" not in budget:
        words = f"FLOPs of {YARDSTICK}, {words}"
    try:
        tokenprune.patch(model, name, **arguments)
        with torch.inference_mode():
            model(**example)
        report = tokenprune.report(model).to_dict()
    except TokenPruneError as error:
        if required and not isinstance(error, BudgetError):
            raise
        return LvlmArm(label, words, None, note=str(error), positions=positions)
    return LvlmArm(
        label,
        words,
        model,
        flops_ratio=report["flops_ratio"],
        tokens=round(report["places"][-1]["tokens_out"]),
        positions=positions,
    )
