"""A table of results with the conditions under which they were measured."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval
from tokenprune.latency import device_name

Cell = str | int | float | bool | None
Row = dict[str, Cell]
SUFFIXES = (".json", ".csv", ".md", ".txt")


@dataclass
class Table:
    """Rows of named cells and the environment they were measured in.

    A cell named `x` whose row also has `x_low` and `x_high` is shown with its interval in text and Markdown; JSON and
    CSV keep the three apart. A cell that does not apply or was not measured is None, never an invented number.
    """

    rows: list[Row]
    environment: Row = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Every column name, in the order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def to_json(self) -> str:
        """The table as strict JSON; NaN and infinities become null."""
        plain = {"environment": _finite(self.environment), "rows": [_finite(row) for row in self.rows]}
        return json.dumps(plain, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The inverse of `to_json`."""
        plain = json.loads(text)
        return cls(rows=plain["rows"], environment=plain["environment"])

    def to_csv(self) -> str:
        """The rows as CSV with a header line; the environment is repeated in each row, so that rows can be pooled."""
        conditions = {name: value for name, value in self.environment.items() if name not in self.columns}
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [*self.columns, *conditions], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_finite({**row, **conditions}) for row in self.rows)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """A GitHub table, followed by one line with the environment."""
        header, *body = self._shown()
        lines = [header, ["---"] * len(header), *body]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{table}\n\n{self._conditions()}\n"

    def to_text(self) -> str:
        """Aligned columns for a terminal, followed by one line with the environment."""
        lines = self._shown()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return f"{text}\n\n{self._conditions()}\n"

    def __str__(self) -> str:
        return self.to_text()

    def save(self, path: str | Path) -> None:
        """Writes the table to `path`, in one piece, as its suffix says: .json, .csv, .md or .txt."""
        writers = dict(zip(SUFFIXES, (self.to_json, self.to_csv, self.to_markdown, self.to_text), strict=True))
        path = checked_path(path, SUFFIXES)
        part = path.with_name(f"{path.name}.part")
        part.write_text(writers[path.suffix.lower()](), encoding="utf-8")
        part.replace(path)

    def _shown(self) -> list[list[str]]:
        """Header and rows as strings; interval ends are folded into their estimate, empty columns left out."""
        columns = self.columns
        ends = {f"{name}_{end}" for name in columns for end in ("low", "high")}
        shown = [c for c in columns if c not in ends and any(row.get(c) not in (None, "") for row in self.rows)]
        return [shown, *([_text(row, column) for column in shown] for row in self.rows)]

    def _conditions(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.environment.items())


def checked_path(path: str | Path, suffixes: Collection[str]) -> Path:
    """`path`, which can be asked before anything is computed for it.

    Raises TokenPruneError where its folder does not exist or its suffix is none of `suffixes`.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise TokenPruneError(f"cannot write to {path}: its name must end in one of {', '.join(sorted(suffixes))}")
    if not path.parent.is_dir():
        raise TokenPruneError(f"cannot write to {path}: there is no folder {path.parent}")
    return path


def environment(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Row:
    """What a number depends on: device, threads, dtype, versions of Python, torch, timm and tokenprune, the unit."""
    device = torch.device(device)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "tokenprune": tokenprune.__version__,
        "unit": "multiply-adds (1 multiply-add = 2 FLOPs)",
    }


def interval_cells(name: str, found: Interval) -> Row:
    """The three cells that `Table` shows as one: `name`, `name_low` and `name_high`."""
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def version(distribution: str) -> str | None:
    """Of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finite(row: Mapping[str, Cell]) -> Row:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _text(row: Row, column: str) -> str:
    value, low, high = (row.get(name) for name in (column, f"{column}_low", f"{column}_high"))
    if low is None or high is None:
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
