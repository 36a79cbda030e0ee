"""The rows of docs/quality.md: what each method for image towers leaves of a model's answers, at each budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenprune.evals.accuracy import compare, run_unpatched
from tokenprune.evals.accuracy_rows import Dense, UnpatchedBatch
from tokenprune.evals.arms import (
    SMALLER_INPUT,
    UNPATCHED,
    Arm,
    build_arms,
    comparable,
    smaller_arm,
)
from tokenprune.evals.calibrated_arms import Calibrated
from tokenprune.evals.cases import Case
from tokenprune.evals.data import ImageData
from tokenprune.evals.models import DIGITS, DINOV2, LoadedModel
from tokenprune.evals.table import Row, Table

BUDGETS = (0.6, 0.5, 0.8, 0.4)
"""Shares of the multiply-adds, in the order in which they are measured."""


@dataclass(frozen=True)
class Task:
    """What is asked of a model. measure: the column that ranks the methods, `label` in words, drawn from `least` on.
    dense: patch tokens are read, so all of the last block is computed and counted. samples: images a row, None for all
    that there are. calibrated_on: images without labels on which thresholds are found."""

    model: str
    measure: str
    label: str
    least: float
    calibrated_on: int
    batch_size: int
    samples: int | None = None
    dense: bool = False


TASKS: Mapping[str, Task] = {
    "digits": Task(DIGITS, "top1_kept", "share of the unpatched top-1", 0.6, 100, 50, samples=1000),
    "saliency": Task(
        DINOV2, "saliency", "correlation with the unpatched saliency map", 0.6, 18, 9, samples=27, dense=True
    ),
    "neighbours": Task(DINOV2, "knn_kept", "share of the unpatched nearest-neighbour accuracy", 0.6, 18, 15),
}


@dataclass(frozen=True)
class Bench:
    """The unpatched model on a task's images, run once for all rows. calibration: images [N, C, H, W]."""

    task: Task
    unpatched: Arm
    data: ImageData
    batches: Sequence[UnpatchedBatch]
    calibration: Tensor
    saliency: Dense | None
    samples: int | None
    seed: int

    @property
    def example(self) -> Tensor:
        """Two images on which budgets are solved."""
        return self.batches[0].images[:2]

    def table(self, *arms: Arm) -> Table:
        """The unpatched model and `arms`, as `tokenprune.evals.evaluate` has them."""
        return compare(
            [self.unpatched, *arms],
            self.batches,
            self.data,
            samples=self.samples,
            seed=self.seed,
            saliency=self.saliency,
        )


def open_bench(
    task: Task, loaded: LoadedModel, data: ImageData, unlabelled: ImageData, *, samples: int | None, seed: int
) -> Bench:
    """samples: of `data`, drawn by `seed`. unlabelled: what thresholds are found on."""
    saliency = loaded.saliency if task.dense else None
    example = next(data.batches(2, samples=samples, seed=seed))[0]
    [unpatched] = build_arms(loaded.model, example, [], [], baselines=False)
    count = min(task.calibrated_on, unlabelled.size)
    calibration = next(unlabelled.batches(count, samples=count, seed=seed))[0]
    seen = run_unpatched(unpatched, data, batch_size=task.batch_size, samples=samples, seed=seed, saliency=saliency)
    batches = list(seen)
    return Bench(task, unpatched, data, batches, calibration, saliency, samples, seed)


def quality_cases(bench: Bench, methods: Sequence[str] | None = None, budgets: Sequence[float] = BUDGETS) -> list[Case]:
    """The unpatched model, then every method and a smaller input at a budget after the other.

    methods: names, `smaller input` among them, None for all that fit the model. A row's `flops` is the share that was
    asked for, `flops_ratio` the mean that was measured. A row without a score says in its `note` why.
    """
    model = bench.unpatched.model
    names = methods or [*comparable(model), SMALLER_INPUT]
    whole: Row = {bench.task.measure: 1.0}
    first = Case({"method": UNPATCHED, "flops": 1.0}, lambda: [_cells(bench.table().rows[0] | whole)])
    return [first, *_budget_cases(bench, names, budgets)]


def _budget_cases(bench: Bench, names: Sequence[str], budgets: Sequence[float]) -> Iterator[Case]:
    for flops in budgets:
        for name in names:
            yield Case({"method": name, "flops": flops}, partial(_run, bench, name, flops))


def _run(bench: Bench, name: str, flops: float) -> list[Row]:
    return [_cells(bench.table(quality_arm(bench, name, flops)).rows[-1])]


def _cells(row: Row) -> Row:
    return {column: cell for column, cell in row.items() if column not in ("method", "budget")}


def quality_arm(bench: Bench, name: str, flops: float) -> Arm:
    """A method, or a smaller input, at a share `flops` of the multiply-adds; of an adaptive method the mean over the
    calibration images is that share."""
    base, budget = bench.unpatched.model, {"flops": flops}
    assert base is not None
    if name == SMALLER_INPUT:
        return smaller_arm(base, bench.example, budget)
    task = bench.task
    return Calibrated(base, bench.example, bench.calibration, task.batch_size, task.dense).arm(
        name, budget, required=True
    )
