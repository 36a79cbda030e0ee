"""The rows of a long measurement, each stored when it is there, so that what ends it early costs only the others."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.table import Row, Table


@dataclass(frozen=True)
class Case:
    """labels: cells that say what is measured. run: measures it; a row, or several, of cells to go with the labels."""

    labels: Row
    run: Callable[[], Sequence[Row]]


def run_cases(
    cases: Iterable[Case],
    environment: Row,
    path: Path,
    *,
    seconds: float | None = None,
    resume: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Table:
    """Runs `cases` in turn and writes `path`.json and `path`.md behind each. One that fails becomes a row whose `note`
    is the error's text, and its traceback is printed; when `seconds` are over none is begun any more, and each that is
    left is a row that says so. resume: keep the rows that are in `path`.json and run the cases that have none there;
    what is left when the seconds are over is for the next run.

    Raises TokenPruneError where those rows were measured under another `environment`.
    """
    table, start = Table(_kept(path, environment) if resume else [], environment), clock()
    for case in cases:
        if resume and any(case.labels.items() <= row.items() for row in table.rows):
            continue
        began = clock()
        if seconds is not None and began - start >= seconds:
            if resume:
                break
            table.rows.append({**case.labels, "note": f"not begun: the {seconds:g} s of this table were over"})
        else:
            _free()
            try:
                table.rows += [{**case.labels, **row} for row in case.run()]
            except Exception as error:
                traceback.print_exc()
                table.rows.append({**case.labels, "note": " ".join(f"{type(error).__name__}: {error}".split())})
            print(f"{path.name}: {case.labels}, {clock() - began:.1f} s", file=sys.stderr, flush=True)
        for suffix in (".json", ".md"):
            table.save(path.with_name(path.name + suffix))
    return table


def _kept(path: Path, environment: Row) -> list[Row]:
    stored = path.with_name(path.name + ".json")
    if not stored.exists():
        return []
    table = Table.from_json(stored.read_text(encoding="utf-8"))
    for name in {**table.environment, **environment}:
        then, now = table.environment.get(name), environment.get(name)
        if then != now:
            raise TokenPruneError(
                f"{stored} was measured with {name} {then}, and not {now}: take that, or another folder"
            )
    return table.rows


def _free() -> None:
    """Patched copies are rings of references: what they hold of a GPU's memory is given back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
