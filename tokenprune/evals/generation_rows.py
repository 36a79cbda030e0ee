"""The rows of docs/diffusion-quality.md: which methods on the small diffusion models, at which budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenprune.evals.arms import FEWER_STEPS, FIRST_STEPS, UNPATCHED, Budget, budget_label
from tokenprune.evals.digits_denoisers import DIT, UNET
from tokenprune.evals.drawing_orders import Orders
from tokenprune.evals.generation_arms import GenerationArm, fewer_steps, first_steps, method_arm

STEPS = 10
"""Of an unpatched run: half of what the pipelines take by default, for half of the time."""


class First(NamedTuple):
    """The first `steps` of the unpatched run's, of which the last goes all the way."""

    steps: int


Kind = int | First | tuple[str, Budget]
"""A number of even steps without a patch, the first ones alone, or a method with the keywords of its patch."""

WHOLE_BLOCK: Budget = {"merge_crossattn": True, "merge_mlp": True}
CROSS: Budget = {"attention": "cross", "similar_by": "hidden"}
GAIN: Budget = {"recover": "gain", "similar_by": "hidden"}
CROSS_GAIN: Budget = {**CROSS, **GAIN}
THREE_ROUNDS: Budget = {**CROSS_GAIN, "iterations": 3}
BASELINE_GAIN: Budget = {"recover": "gain"}
EVERY_STEP: Budget = {"steps": {}}
# What `at_edm` does by default: on the small DiT, both of whose stacks are at its edges, it is the whole model.
PRUNE_LESS: Budget = {"steps": {(0.0, 0.3): {"edges": 0.0}}}
VARIANTS = {
    "whole blocks": WHOLE_BLOCK,
    "cross-attention": CROSS,
    "gain": GAIN,
    "cross-attention, gain": CROSS_GAIN,
    "cross-attention, gain, three rounds": THREE_ROUNDS,
    "all steps alike": EVERY_STEP,
    "every second step dense": {"interval": 2},
    "schedule of at_edm": PRUNE_LESS,
}


def _at(budgets: Sequence[float], method: str, **options: Any) -> list[Kind]:
    return [(method, {"flops": flops, **options}) for flops in budgets]


# Each method from 0.9 down to the least that it reaches. Where that is above 0.5 the row at 0.5 says so. Methods for
# classifiers that fit as well stand at two budgets.
ROWS: Mapping[str, Sequence[Kind]] = {
    DIT: (
        *(8, 7, 6, 5, 4, 3, 9),
        *(First(3), First(5), First(4), First(2)),
        *_at((0.8, 0.65, 0.55, 0.5, 0.35, 0.9), "random"),
        *_at((0.8, 0.65, 0.55, 0.5, 0.35, 0.9), "uniform"),
        *_at((0.8, 0.65, 0.59, 0.9, 0.5), "at_edm"),
        *_at((0.8, 0.65, 0.55, 0.9, 0.5), "tomesd"),
        *_at((0.8, 0.65, 0.55, 0.5, 0.35, 0.23, 0.9), "tomesd", **WHOLE_BLOCK),
        *_at((0.8, 0.65, 0.55, 0.5, 0.35, 0.2, 0.9), "toma"),
        *_at((0.8, 0.65, 0.55, 0.9, 0.5), "todo"),
        *_at((0.8, 0.65, 0.55, 0.5, 0.31, 0.9), "ras", dense_steps=(0, 1, 2)),
        *_at((0.63, 0.55, 0.49, 0.8), "toca"),
        *_at((0.73, 0.65, 0.6), "toca", interval=2),
        *_at((0.8, 0.65, 0.55, 0.41), "at_edm", **EVERY_STEP),
        *_at((0.8, 0.65, 0.55), "random", **PRUNE_LESS),
        *(row for method in ("top_k", "evit", "zero_tprune") for row in _at((0.8, 0.65), method)),
    ),
    UNET: (
        *(8, 7, 6, 5, 4, 9),
        *(First(3), First(5), First(4), First(2)),
        *_at((0.8, 0.69, 0.65, 0.54, 0.9, 0.5), "random"),
        *_at((0.8, 0.69, 0.65, 0.54, 0.9, 0.5), "uniform"),
        *_at((0.8, 0.69, 0.65, 0.9, 0.5), "at_edm"),
        *_at((0.8, 0.69, 0.65, 0.61, 0.9), "at_edm", **CROSS),
        *_at((0.65, 0.8), "at_edm", **CROSS_GAIN),
        *_at((0.8, 0.69, 0.65), "at_edm", **THREE_ROUNDS),
        *(row for method in ("random", "uniform") for row in _at((0.8, 0.69, 0.65), method, **BASELINE_GAIN)),
        *_at((0.8, 0.65), "at_edm", **GAIN),
        *_at((0.8, 0.69, 0.9, 0.65, 0.5), "tomesd"),
        *_at((0.8, 0.69, 0.65, 0.54, 0.45, 0.9), "tomesd", **WHOLE_BLOCK),
        *_at((0.8, 0.69, 0.65, 0.54, 0.5, 0.3, 0.9), "toma"),
        *_at((0.8, 0.69, 0.66, 0.9, 0.5), "todo"),
        *_at((0.73, 0.69, 0.65, 0.8, 0.5), "toca"),
        *_at((0.81, 0.74), "toca", interval=2),
        *_at((0.8, 0.65, 0.59), "at_edm", **EVERY_STEP),
        *_at((0.8, 0.69, 0.65), "random", **PRUNE_LESS),
        *(row for method in ("top_k", "evit", "zero_tprune") for row in _at((0.8, 0.65), method)),
    ),
}


def build(first: GenerationArm, kind: Kind, orders: Orders) -> GenerationArm:
    """The arm of a row beside the unpatched `first`; budgets are solved on the first two of the orders."""
    if isinstance(kind, int):
        return first if kind == first.steps else fewer_steps(first, kind, "")
    if isinstance(kind, First):
        return first_steps(first, kind.steps)
    return method_arm(first, orders.first(2), *kind, required=True)


def name_of(kind: Kind, steps: int = STEPS) -> str:
    """What the files of a row are called; steps: of the unpatched run."""
    if isinstance(kind, int):
        told = f"{UNPATCHED if kind == steps else FEWER_STEPS} {kind} steps"
    elif isinstance(kind, First):
        told = f"{FIRST_STEPS} {kind.steps} of {steps}"
    else:
        told = f"{kind[0]} {budget_label(kind[1])} {steps} steps"
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in told).split())
