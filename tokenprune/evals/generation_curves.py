"""The quality of the small diffusion models' pictures against measured time, for the rows of docs/diffusion-quality.md.

    python -m tokenprune.evals.generation_curves dit-digits --output FOLDER

Pictures are kept in FOLDER, so that a run which is stopped goes on where it was, or with more `--samples`; `--rows 3`
draws at most three more rows, and `--rounds 20` draws none and times whole runs instead, all rows in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from tokenprune.evals.arms import Budget, budget_label
from tokenprune.evals.digits_denoisers import CHECKPOINTS, DIT, UNET
from tokenprune.evals.digits_pipelines import GUIDANCE, DigitsPipeline, digits_pipeline, pipeline_of
from tokenprune.evals.drawing_orders import Orders, drawing_orders
from tokenprune.evals.generation import REAL_IMAGES, real_features, score_drawings
from tokenprune.evals.generation_arms import GenerationArm, fewer_steps, method_arm, unpatched_arm
from tokenprune.evals.kept_pictures import draw_missing, kept
from tokenprune.evals.plot import plot_accuracy_against_speed
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import measure_together

STEPS = 10
"""Of an unpatched run: half of what the pipelines take by default, for half of the time."""

BATCH = 10
TIMED_BATCH = 2
WHOLE_BLOCK: Budget = {"merge_crossattn": True, "merge_mlp": True}
CROSS: Budget = {"attention": "cross", "similar_by": "hidden"}
VARIANTS = {"whole blocks": WHOLE_BLOCK, "cross-attention": CROSS}

LATE = {(0.0, 0.3): 0.0}
"""What `at_edm` does by default on the small DiT, both of whose stacks are at its edges."""

# A number of steps, or a method with the keywords of its patch; in the order in which they are drawn.
Kind = int | tuple[str, Budget]
ROWS: Mapping[str, Sequence[Kind]] = {
    DIT: (
        ("random", {"flops": 0.65}),
        ("tomesd", {"flops": 0.65, **WHOLE_BLOCK}),
        7,
        ("uniform", {"flops": 0.65}),
        ("at_edm", {"flops": 0.65}),
        ("tomesd", {"ratio": 0.75}),
        ("random", {"flops": 0.65, "steps": LATE}),
        ("at_edm", {"flops": 0.54, "steps": {}}),
        5,
        ("toma", {"flops": 0.65}),
        ("ras", {"flops": 0.65, "dense_steps": (0, 1, 2)}),
        ("toca", {"flops": 0.6}),
        ("todo", {"flops": 0.65}),
    ),
    UNET: (
        ("random", {"flops": 0.8}),
        ("at_edm", {"flops": 0.8, **CROSS}),
        ("tomesd", {"flops": 0.8, **WHOLE_BLOCK}),
        ("uniform", {"flops": 0.8}),
        8,
        ("at_edm", {"flops": 0.8}),
        ("tomesd", {"ratio": 0.75}),
        ("tomesd", {"flops": 0.65, **WHOLE_BLOCK}),
    ),
}


def build(pipe: DigitsPipeline, rows: Sequence[Kind], orders: Orders, *, steps: int) -> list[GenerationArm]:
    """The unpatched pipeline and an arm for each of `rows`; budgets are solved on two of the orders."""
    first = unpatched_arm(pipe, orders.first(2), steps=steps)
    arms = [first]
    for row in rows:
        if isinstance(row, int):
            arms.append(fewer_steps(first, row, ""))
        else:
            arms.append(method_arm(first, orders.first(2), *row, required=True))
    return arms


def name_of(arm: GenerationArm) -> str:
    """What the files of an arm are called."""
    told = f"{arm.method} {arm.budget} {arm.steps} steps"
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in told).split())


def time_rows(arms: Sequence[GenerationArm], orders: Orders, rounds: int) -> dict[str, Row]:
    """{name: cells of its timing} of whole runs on the first TIMED_BATCH orders, all arms in turn."""
    base = arms[0]
    assert base.model is not None
    again = pipeline_of(shared_copy(base.model))
    timed = [*(arm for arm in arms if arm.pipe is not None), replace(base, pipe=again, model=again.denoiser)]
    found = measure_together([partial(arm.draw, orders.first(TIMED_BATCH)) for arm in timed], rounds)
    return {name_of(arm): timing.cells() for arm, timing in zip(timed[:-1], found[:-1], strict=True)}


def curve_table(
    arms: Sequence[GenerationArm], drawings: Sequence[Tensor | None], times: Mapping[str, Row], labels: Tensor
) -> Table:
    """Quality (columns of `evaluate_generation`) of the arms that were drawn, with the times that there are."""
    rows = score_drawings(arms, drawings, labels, real_features())
    for arm, row in zip(arms, rows, strict=True):
        for words, options in VARIANTS.items():
            if (label := f", {budget_label(options)}") in arm.budget:
                row |= {"method": f"{arm.method}, {words}", "budget": arm.budget.replace(label, "")}
        row.update(times.get(name_of(arm), {}))
        row["note"] = row.pop("note")  # the last column
    conditions: Row = {"images": len(labels), "steps": STEPS, "guidance": GUIDANCE, "real images": REAL_IMAGES}
    return Table(rows, conditions | environment())


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws or times the rows, then writes curves-MODEL.md, .json and .png of what is drawn into the folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.generation_curves", description=main.__doc__)
    parser.add_argument("model", choices=list(CHECKPOINTS))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=1000, help="pictures a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="draw at most so many more, or time the first ones (default: all)")
    parser.add_argument("--rounds", type=int, help="time so many rounds instead of drawing")
    options = parser.parse_args(arguments)
    if options.samples % BATCH:
        parser.error(f"--samples {options.samples}: pictures are drawn and kept {BATCH} at a time")
    folder: Path = options.output / f"{options.model}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    orders, clocked = drawing_orders(options.samples, options.seed), folder / "times.json"
    times: dict[str, Row] = json.loads(clocked.read_text()) if clocked.exists() else {}
    rows = ROWS[options.model] if options.rounds is None else ROWS[options.model][: options.rows]
    arms = build(digits_pipeline(options.model), rows, orders, steps=STEPS)
    if options.rounds is not None:
        times |= time_rows(arms, orders, options.rounds)
        clocked.write_text(json.dumps(times, indent=1))
    limit = options.rows if options.rounds is None else 0
    batches, begun = list(orders.batches(BATCH)), 0
    drawings: dict[str, Tensor | None] = {}
    for arm in arms:
        place = folder / name_of(arm)
        drawings[place.name] = kept(place, len(batches))
        if arm.pipe is None or drawings[place.name] is not None or begun == limit:
            continue
        begun += 1
        draw_missing(place, len(batches), lambda number, arm=arm: arm.draw(batches[number]))  # type: ignore[misc]
        drawings[place.name] = kept(place, len(batches))
        print(f"drawn: {place.name}", flush=True)
    if drawings[name_of(arms[0])] is None:
        return 0  # only timed yet: the unpatched pictures are what others are held to
    drawn = [arm for arm in arms if arm.pipe is None or drawings[name_of(arm)] is not None]
    pictures = [drawings[name_of(arm)] for arm in drawn]
    table = curve_table(drawn, pictures, times, orders.labels)
    for suffix in ("md", "json"):
        table.save(options.output / f"curves-{options.model}.{suffix}")
    plot_accuracy_against_speed(table, options.output / f"curves-{options.model}.png", "frechet")
    print(table.to_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
