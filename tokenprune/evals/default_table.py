"""The rows of image towers in `tokenprune/defaults.json`, from the measured quality of each method at each budget.

    python -m tokenprune.evals.default_table quality.json > tokenprune/defaults.json

quality.json: {task: {"model", "measure", "rows"}}, a row with "method", "flops" (asked for), "flops_ratio" and the
measure, a share of the unpatched model's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenprune.defaults import default_rows
from tokenprune.registry import make_method, method_names

TOWERS = ["timm_vit", "hf_vision"]
RANKED = 3
"""Methods in a row: the best, and what models take that cannot run it. The best of those that add no bias to attention
comes behind them, as some attention takes none."""

BY_CHANCE = ("neighbours",)
"""Tasks that rank nothing: nearest neighbours of 99 drawings tell methods apart by 0.1 to 0.2 at best."""

MET = 0.01
"""How near FLOPs have to be to what was asked for."""


def tower_rows(quality: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """A row for each range of flops budgets, and one for all other budgets: the methods of the highest mean over the
    tasks, of those that met the budget in every one. Adaptive methods need calibrated thresholds and are left out."""
    scores = _scores(quality)
    budgets = sorted({budget for _, budget in scores}, reverse=True)
    edges = [1.0, *((a + b) / 2 for a, b in pairwise(budgets)), 0.0]
    rows: list[dict[str, Any]] = []
    for number, budget in enumerate(budgets):
        best = _best({method: score for (method, at), score in scores.items() if at == budget})
        told = f"{source}, at flops={budget:g}"
        low, high = round(edges[number + 1], 3), round(edges[number], 3)
        rows.append({"families": TOWERS, "flops": [low, high], "methods": best, "source": told})
    everywhere = {method for method, _ in scores if all((method, budget) in scores for budget in budgets)}
    overall = {method: fmean(scores[method, budget] for budget in budgets) for method in everywhere}
    told = f"{source}, mean over {', '.join(f'{budget:g}' for budget in budgets)}"
    return [*rows, {"families": TOWERS, "methods": _best(overall), "source": told}]


def _scores(quality: Mapping[str, Any]) -> dict[tuple[str, float], float]:
    """(method, budget): the mean over the tasks."""
    fixed = {name for name in method_names() if not make_method(name, {}).adaptive}
    found: dict[tuple[str, float], list[float]] = {}
    tasks = [task for name, task in quality.items() if name not in BY_CHANCE]
    for task in tasks:
        for row in task["rows"]:
            score = row.get(task["measure"])
            if row["method"] in fixed and score is not None and abs(row["flops_ratio"] - row["flops"]) <= MET:
                found.setdefault((row["method"], row["flops"]), []).append(score)
    return {cell: fmean(scores) for cell, scores in found.items() if len(scores) == len(tasks)}


def _best(scores: Mapping[str, float]) -> list[str]:
    ranked = sorted(scores, key=lambda method: (-scores[method], method))
    plain = [method for method in ranked if not make_method(method, {}).proportional]
    return [*ranked[:RANKED], *(method for method in plain[:1] if method not in ranked[:RANKED])]


def to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a line."""
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table with the rows of image towers made anew."""
    (path,) = arguments if arguments is not None else sys.argv[1:]
    others = [row for row in default_rows() if row["families"] != TOWERS]
    print(to_json([*tower_rows(json.loads(Path(path).read_text()), "docs/quality.md"), *others]), end="")


if __name__ == "__main__":
    main()
