"""Accuracy against speed, as a PNG or SVG."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.evals.arms import FEWER_STEPS, SMALLER_INPUT, UNPATCHED
from tokenprune.evals.table import Cell, Row, Table

MARKERS = ("o", "v", "D")
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
BASELINE_STYLES = {
    UNPATCHED: ("black", "*"),
    "random": ("0.55", "x"),
    "uniform": ("0.55", "+"),
    SMALLER_INPUT: ("0.55", "s"),
    FEWER_STEPS: ("0.2", "s"),
}


def plot_accuracy_against_speed(table: Table, path: str | Path, quality: str = "top1") -> None:
    """Draws `quality` over `speedup` for every row of `table` that has both, with their intervals, to `path`.

    The suffix of `path` (.png, .svg) decides the format. Baselines are grey, the unpatched model is a star, the budgets
    of one method are joined by a line, and a red ring marks a point whose control was off by more than 2%.
    """
    figure, axes = _curves(table, quality, "speedup")
    doubtful = [row for row in _with(table, quality, "speedup") if not row.get("trusted")]
    axes.scatter(
        [_value(row, "speedup") for row in doubtful],
        [_value(row, quality) for row in doubtful],
        s=90,
        facecolors="none",
        edgecolors="red",
        zorder=3,
    )
    axes.set_xlabel("measured speed-up over the unpatched model (red ring: the machine was not quiet)")
    figure.savefig(path, dpi=140)


def plot_quality_against_flops(table: Table, path: str | Path, quality: str, *, least: float, label: str) -> None:
    """Draws `quality` over `flops_ratio` as `plot_accuracy_against_speed` does. least: what the axis of `quality`,
    which `label` names, begins at; lines below leave the picture."""
    figure, axes = _curves(table, quality, "flops_ratio")
    axes.set(xlabel="multiply-adds over the unpatched model's", ylabel=label)
    axes.set_ylim(bottom=least)
    figure.savefig(path, dpi=110)


def _curves(table: Table, quality: str, over: str) -> tuple[Any, Any]:
    """A figure with `quality` over the column `over`, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in _with(table, quality, over):
        lines[str(row["method"])].append(row)
    styles = itertools.cycle(itertools.product(MARKERS, COLOURS))
    for method, found in lines.items():
        rows = sorted(found, key=lambda row: _value(row, over))
        colour, marker = BASELINE_STYLES.get(method) or next(styles)[::-1]
        axes.errorbar(
            [_value(row, over) for row in rows],
            [_value(row, quality) for row in rows],
            xerr=_ends(rows, over),
            yerr=_ends(rows, quality),
            color=colour,
            marker=marker,
            markersize=12 if method == UNPATCHED else 6,
            linewidth=1,
            elinewidth=0.7,
            label=method,
        )
    axes.set_ylabel(quality)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    environment = table.environment
    axes.set_title(
        ", ".join(f"{k} {environment[k]}" for k in ("device", "threads", "dtype") if k in environment), size=8
    )
    return figure, axes


def _with(table: Table, *names: str) -> list[Row]:
    """The rows that have all of these cells."""
    return [row for row in table.rows if all(row.get(name) is not None for name in names)]


def plot_time_against_mask(table: Table, path: str | Path) -> None:
    """Draws `time` over `mask` of `tokenprune.evals.region_speed` to `path`, and what the mask alone would cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    shares, times = ([_value(row, name) for row in table.rows] for name in ("mask", "time"))
    axes.errorbar(shares, times, yerr=_ends(table.rows, "time"), marker="o", label="region, ring of one token")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="in proportion to the mask")
    axes.set(
        xlabel="share of the picture under the mask", ylabel="time over the full run's", xlim=(0, 1), ylim=(0, 1.25)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def plot_training(logs: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Draws the losses of trainings by name over their steps to `path`; a log has the lines of a checkpoint's record.

    Where the canvas changes the task does too, and a dotted line stands there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(logs), 3.2), layout="constrained")
    for axes, (name, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        steps = [line["step"] for line in log]
        axes.plot(steps, [line["loss"] for line in log], label="training")
        axes.plot(steps, [line["validation"] for line in log], label="validation, averaged weights")
        for before, after in itertools.pairwise(log):
            if before["canvas"] != after["canvas"]:
                axes.axvline(before["step"], color="0.5", linestyle=":")
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
    axes.set_ylabel("mean squared error of the velocity")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _value(row: Row, name: str) -> float:
    return _number(row[name])


def _ends(rows: list[Row], name: str) -> list[list[float]]:
    """Distances to the lower and to the upper end of the interval, 0 where there is none."""
    below = [_value(row, name) - _end(row, name, "low") for row in rows]
    above = [_end(row, name, "high") - _value(row, name) for row in rows]
    return [below, above]


def _end(row: Row, name: str, end: str) -> float:
    cell = row.get(f"{name}_{end}")
    return _value(row, name) if cell is None else _number(cell)


def _number(cell: Cell) -> float:
    assert isinstance(cell, (int, float)), f"{cell!r} is no number"
    return float(cell)
