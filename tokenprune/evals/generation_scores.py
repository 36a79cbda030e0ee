"""What was found of rows of pictures, kept in a file: their qualities, and resampled distances to compare any two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import torch

from tokenprune.evals.frechet import interval
from tokenprune.evals.table import Row, interval_cells


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
    return interval_cells(name, found.estimate, found.low, found.high)


def longest(runs: Iterable[Scored], limit: float, cost: Mapping[int, float]) -> Scored | None:
    """Of unpatched runs the one of the most steps that costs at most `limit`; cost: by the number of steps."""
    steps = {int(str(run["cells"]["steps"])): run for run in runs}
    within = [count for count in steps if cost.get(count, float("inf")) <= limit]
    return steps[max(within)] if within else None
