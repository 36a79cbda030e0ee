"""Which method `patch` takes where none is named: the first of a small table that fits family and budget.

The table is `defaults.json`, in order: rows of "families" (adapters; none for all), "methods" (names, or [name,
{option: value}], the best first), "source" (what was measured) and, of a row for a flops budget, "flops": [from, to),
the last of them up to 1.0 included. `python -m tokenprune.evals.default_table` writes the rows of image towers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from tokenprune.budget import Budget

FILE = "defaults.json"


@dataclass(frozen=True)
class Choice:
    """A method with its options. source: what was measured that speaks for it."""

    method: str
    options: Mapping[str, Any]
    source: str


def default_choices(family: str, budget: Budget) -> tuple[Choice, ...]:
    """Methods for a family and budget, the best first; a model that cannot run one gets the next."""
    return next(choices_of(row) for row in default_rows() if _fits(row, family, budget))


@cache
def default_rows() -> Sequence[Mapping[str, Any]]:
    """The rows of the table that comes with the package."""
    rows: list[Mapping[str, Any]] = json.loads((resources.files("tokenprune") / FILE).read_text(encoding="utf-8"))
    return rows


def choices_of(row: Mapping[str, Any]) -> tuple[Choice, ...]:
    """The methods of a row."""
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in row["methods"]]
    return tuple(Choice(name, options, row["source"]) for name, options in pairs)


def _fits(row: Mapping[str, Any], family: str, budget: Budget) -> bool:
    if row["families"] and family not in row["families"]:
        return False
    if "flops" not in row:
        return True
    low, high = row["flops"]
    return budget.kind == "flops" and (low <= budget.value < high or budget.value == high == 1.0)
