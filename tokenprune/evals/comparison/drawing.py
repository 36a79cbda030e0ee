"""The rows of a comparison of diffusion models: pictures from the same noise, and the time of whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenprune.evals.arms import FEWER_STEPS, Budget, budget_label
from tokenprune.evals.comparison.measuring import measured_once, measured_path
from tokenprune.evals.comparison.overlays import addresses
from tokenprune.evals.digits_pipelines import GUIDANCE, DigitsPipeline
from tokenprune.evals.drawing_orders import drawing_orders
from tokenprune.evals.frechet import Gaussian
from tokenprune.evals.generation import draw, real_features, score_drawings, together
from tokenprune.evals.generation_arms import GenerationArm, equal_time, first_steps, generation_arms, unipc_steps
from tokenprune.evals.generation_bench import time_together
from tokenprune.evals.table import Row, Table, environment

TIMED_BATCH = 2
SHOWN = 6


def draw_budgets(
    pipe: DigitsPipeline,
    name: str,
    methods: Sequence[str] | None,
    budgets: Sequence[Budget],
    folder: Path,
    *,
    samples: int,
    batch_size: int,
    steps: int,
    rounds: int,
    seed: int,
    show_progress: bool,
) -> Iterator[tuple[Table, list[dict[str, Any]]]]:
    """For each budget in turn its table, the unpatched row first, and for each row of it the method, the budget and the
    first pictures as data: addresses.

    Beside the methods stand, at equal FLOPs, fewer even steps, the first steps alone and even steps of UniPC, and even
    steps of equal time. What is in `folder` already is read and not drawn again.
    """
    orders, done = drawing_orders(samples, seed), dict[str, Any]()
    timed = orders.first(TIMED_BATCH)

    def pictures_of(arm: GenerationArm) -> Tensor | None:
        key = f"{arm.method} {arm.steps}"  # without a patch the same at every budget
        if arm.is_patched or key not in done:
            done[key] = together(draw(arm, list(orders.batches(batch_size)), show_progress=show_progress))
        return done[key]  # type: ignore[no-any-return]

    def real() -> Gaussian:
        if "real" not in done:
            done["real"] = real_features()
        return done["real"]  # type: ignore[no-any-return]

    def measure(budget: Budget, shown: Path) -> Table:
        arms = generation_arms(pipe, orders.first(2), methods, [budget], steps=steps)
        base, label = arms[0], budget_label(budget)
        counts = [arm.steps for arm in arms if arm.method == FEWER_STEPS]
        for count in counts:
            first = first_steps(base, count)
            arms += [*([] if count == steps else [unipc_steps(base, count, label)]), replace(first, budget=label)]
        found = time_together(arms, timed, rounds=rounds, seed=seed)
        extra = equal_time(arms, [one.speedup if one else None for one in found])
        if extra:
            found += time_together([base, *extra], timed, rounds=rounds, seed=seed)[1:]
        arms += extra
        drawn = [pictures_of(arm) for arm in arms]
        told = [
            {"method": arm.method, "budget": arm.budget, "pictures": addresses(pictures[:SHOWN])}
            for arm, pictures in zip(arms, drawn, strict=True)
            if pictures is not None
        ]
        shown.write_text(json.dumps(told), encoding="utf-8")
        rows = list[Row]()
        for row, one in zip(score_drawings(arms, drawn, orders.labels, real(), seed=seed), found, strict=True):
            note = row.pop("note")
            cells = {} if one is None else {**one.cells(), "images_per_s": TIMED_BATCH / one.seconds}
            rows.append({**row, **cells, "note": note})
        conditions: Row = {"model": name, "images": samples, "data": "pictures drawn from noise", "batch": TIMED_BATCH}
        return Table(rows, {**conditions, "steps": steps, "guidance": GUIDANCE, **environment()})

    for budget in budgets:
        path = measured_path(folder, name, budget)
        shown = path.with_suffix(".pictures")
        table = measured_once(path, partial(measure, budget, shown))
        yield table, json.loads(shown.read_text(encoding="utf-8"))
