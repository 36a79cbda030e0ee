"""The tables of docs/quality.md: what each method for image towers keeps of a model's answers, at each budget.

    python -m tokenprune.evals.quality_table digits --output FOLDER

measures a task a row after the other; what is measured is in FOLDER, so that a run which is stopped goes on where it
was. `tables` in place of the task only writes what is there as quality.md, plots, and quality.json, the file that the
package ships.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenprune.evals.arms import UNPATCHED
from tokenprune.evals.cases import run_cases
from tokenprune.evals.models import load_model
from tokenprune.evals.openclipart import DEBIAN_FOLDER
from tokenprune.evals.plot import plot_quality_against_flops
from tokenprune.evals.quality_rows import BUDGETS, TASKS, Bench, Task, open_bench, quality_cases
from tokenprune.evals.sources import openclipart_data
from tokenprune.evals.table import Row, Table
from tokenprune.evals.transforms import input_size

NEAR = 0.005
"""By how much the FLOPs of a row may miss what was asked for without being named in its cell."""

DIGITS_KEPT = 4


def pivot(table: Table, measure: str) -> str:
    """`measure` as a Markdown table, a line for each method, a column for each budget, the best method first (in the
    mean over the budgets, none counting as zero); FLOPs that are not those of the column are named. Below it why cells
    are empty."""
    rows = [row for row in table.rows if row["method"] != UNPATCHED]
    budgets = sorted({float(str(row["flops"])) for row in rows}, reverse=True)
    cells = {(str(row["method"]), float(str(row["flops"]))): row for row in rows}
    names = sorted({name for name, _ in cells}, key=lambda name: _rank(name, cells, budgets, measure))
    lines = [["method", *(f"{budget:g}" for budget in budgets)], ["---"] * (1 + len(budgets))]
    for name in names:
        lines.append([f"`{name}`", *(_cell(cells.get((name, budget)), measure) for budget in budgets)])
    shown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    reasons = [
        f"- `{row['method']}` at {row['flops']:g}: {row['note']}"
        for row in rows
        if row.get(measure) is None or "NaN" in str(row.get("note"))
    ]
    return "\n".join([shown, *(["", *reasons] if reasons else [])]) + "\n"


def _rank(
    name: str, cells: Mapping[tuple[str, float], Row], budgets: Sequence[float], measure: str
) -> tuple[float, str]:
    scores = [cells.get((name, budget), {}).get(measure) for budget in budgets]
    known = [score for score in scores if isinstance(score, float)]
    return (-sum(known) / len(budgets), name)


def _cell(row: Row | None, measure: str) -> str:
    if row is None:
        return ""
    value = row.get(measure)
    if not isinstance(value, float):
        return "none"
    low, high = row.get(f"{measure}_low"), row.get(f"{measure}_high")
    shown = f"{value:.3f} [{low:.3f}, {high:.3f}]" if low is not None and high is not None else f"{value:.3f}"
    apart = abs(float(str(row["flops_ratio"])) - float(str(row["flops"]))) > NEAR
    return f"{shown} at {row['flops_ratio']:.2f}" if apart else shown


def rounded(table: Table) -> dict[str, Any]:
    """`table` as plain data, numbers to four digits, without the cells that are None."""
    plain: dict[str, Any] = json.loads(table.to_json())
    for row in plain["rows"]:
        known = {name: cell for name, cell in row.items() if cell is not None}
        row.clear()
        row |= {name: round(cell, DIGITS_KEPT) if isinstance(cell, float) else cell for name, cell in known.items()}
    return plain


def write_tables(folder: Path) -> None:
    """quality.md, quality.json and a plot for each task of which rows are in `folder`.

    quality.json: {task: {"model", "measure", "environment", "rows"}}.
    """
    shipped, sections = dict[str, Any](), list[str]()
    for name, task in TASKS.items():
        stored = folder / f"{name}.json"
        if not stored.exists():
            continue
        table = Table.from_json(stored.read_text(encoding="utf-8"))
        shipped[name] = {"model": task.model, "measure": task.measure, **rounded(table)}
        conditions = ", ".join(f"{key} {value}" for key, value in table.environment.items())
        sections.append(f"## {name}: {task.label}\n\n{pivot(table, task.measure)}\n{conditions}\n")
        plot = folder / f"quality-{name}.png"
        plot_quality_against_flops(table, plot, task.measure, least=task.least, label=task.label)
    (folder / "quality.md").write_text("\n".join(sections), encoding="utf-8")
    text = "{" + ",".join(f"\n{json.dumps(name)}: {_compact(part)}" for name, part in shipped.items()) + "\n}\n"
    (folder / "quality.json").write_text(text, encoding="utf-8")


def _compact(part: Mapping[str, Any]) -> str:
    """JSON with a line for each row."""
    head = {key: value for key, value in part.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in part["rows"])
    return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}'


def bench_of(task: Task, drawings: Path, samples: int | None, seed: int) -> Bench:
    """A task with its model and images. drawings: the folder of openclipart-png."""
    loaded = load_model(task.model)
    if task.measure.startswith("knn"):
        data = unlabelled = openclipart_data(drawings, input_size(loaded.model)[1], loaded.mean, loaded.std)
    else:
        assert loaded.data is not None
        assert loaded.unlabelled is not None
        data, unlabelled = loaded.data(samples or 0, seed), loaded.unlabelled(task.calibrated_on, seed)
    return open_bench(task, loaded, data, unlabelled, samples=samples, seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing of a task's rows and writes all tables."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.quality_table", description=main.__doc__)
    parser.add_argument("task", choices=[*TASKS, "tables"])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--method", action="append", help="only these; several times for several")
    parser.add_argument("--flops", action="append", type=float, help="budgets (default: 0.6, 0.5, 0.8, 0.4)")
    parser.add_argument("--samples", type=int, help="images a row (default: the task's own)")
    parser.add_argument("--limit-seconds", type=float, help="begin no more rows then; the next run goes on")
    parser.add_argument("--seed", type=int, default=0, help="of the images drawn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--drawings", type=Path, default=DEBIAN_FOLDER, help="openclipart-png (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.task != "tables":
        task = TASKS[options.task]
        bench = bench_of(task, options.drawings, options.samples or task.samples, options.seed)
        conditions: Row = {"model": task.model, **bench.table().environment}
        cases = quality_cases(bench, options.method, options.flops or BUDGETS)
        path = options.output / options.task
        run_cases(cases, conditions, path, seconds=options.limit_seconds, resume=True)
    write_tables(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
