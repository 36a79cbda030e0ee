"""What was found of rows of pictures, kept in a file: their qualities, and resampled distances to compare any two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from tokenprune.evals.arms import budget_label
from tokenprune.evals.digits_pipelines import GUIDANCE
from tokenprune.evals.frechet import interval
from tokenprune.evals.generation import REAL_IMAGES
from tokenprune.evals.generation_rows import VARIANTS, First, Kind, name_of
from tokenprune.evals.table import Row, Table, environment, interval_cells

FLOPS_TOLERANCE = 0.005
"""By how much a budget's solution may be above what was asked for and still count as equal."""


class Scored(TypedDict):
    """cells: of the row's table. draws: resampled Fréchet distances, none where the row could not be built. device: on
    which it was drawn."""

    cells: Row
    draws: list[float]
    device: str


def load_scores(path: Path) -> dict[str, Scored]:
    """{name: row} of `path`, nothing where it is not there yet."""
    found: dict[str, Scored] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def save_scores(scores: Mapping[str, Scored], path: Path) -> None:
    """Writes all rows at once, so that a run that is stopped leaves a whole file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(scores, indent=0), encoding="utf-8")
    part.replace(path)


def above(row: Scored, other: Scored | None, name: str) -> Row:
    """Cells `name` of how far the distance of `row` lies above `other`'s, paired; none where one of them has none."""
    if other is None or other is row or not (row["draws"] and other["draws"]):
        return {}
    first, second = (torch.tensor(each["draws"], dtype=torch.float64) for each in (row, other))
    distances = [each["cells"]["frechet"] for each in (row, other)]
    assert isinstance(distances[0], float)
    assert isinstance(distances[1], float)
    found = interval(distances[0] - distances[1], first - second)
    return interval_cells(name, found)


def longest(runs: Iterable[Scored], limit: float, cost: Mapping[int, float]) -> Scored | None:
    """Of unpatched runs the one of the most steps that costs at most `limit`; cost: by the number of steps."""
    steps = {int(str(run["cells"]["steps"])): run for run in runs}
    within = [count for count in steps if cost.get(count, float("inf")) <= limit]
    return steps[max(within)] if within else None


def curve_table(
    kinds: Sequence[Kind], scores: Mapping[str, Scored], times: Mapping[str, Row], *, samples: int, steps: int
) -> Table:
    """Quality (columns of `evaluate_generation`) of the rows that were drawn, with the times that there are.

    steps: of the unpatched run. Besides, paired: `over_random`, how far the Fréchet distance is above that of `random`
    at the same budget, `over_fewer_steps`, above that of the most even steps that take no more FLOPs,
    `over_first_steps`, of the most first ones, and `over_equal_time`, of the most even steps that take no more time.
    """
    names = {name: kind for kind in kinds if (name := name_of(kind, steps)) in scores}
    runs = {kind: name for name, kind in names.items() if isinstance(kind, int)}
    first = [scores[name] for name, kind in names.items() if isinstance(kind, First)]
    flops = {count: count / steps for count in range(steps + 1)}
    seconds = {kind: 1 / float(str(times[name]["speedup"])) for kind, name in runs.items() if name in times}
    rows: list[Row] = []
    for name, kind in names.items():
        scored, timing = scores[name], times.get(name, {})
        row = dict(scored["cells"])
        if not isinstance(kind, int | First):
            method, budget = kind
            for words, options in VARIANTS.items():
                if options.items() <= budget.items():
                    plain = {key: value for key, value in budget.items() if key not in options}
                    row |= {"method": f"{method}, {words}", "budget": budget_label(plain)}
            plain_random = name_of(("random", {"flops": budget.get("flops")}), steps)
            row |= above(scored, scores.get(plain_random), "over_random")
        if not isinstance(kind, int):
            fitting = [scores[run] for run in runs.values()]
            if scored["draws"]:
                limit = float(str(row["flops_ratio"])) + FLOPS_TOLERANCE
                row |= above(scored, longest(fitting, limit, flops), "over_fewer_steps")
                row |= above(scored, longest(first, limit, flops), "over_first_steps")
            if timing:
                limit = 1 / float(str(timing["speedup"]))
                row |= above(scored, longest(fitting, limit, seconds), "over_equal_time")
        rows.append({**row, **timing, "note": row.pop("note")})  # the last column
    drawn_on = ", ".join(sorted({scores[name]["device"] for name in names}))
    conditions: Row = {"images": samples, "steps": steps, "guidance": GUIDANCE, "real images": REAL_IMAGES}
    return Table(rows, {**conditions, "drawn on": drawn_on, **environment()})
