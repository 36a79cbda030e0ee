"""Time and memory of the operations over the number of tokens, as a PNG or SVG."""

from __future__ import annotations

from pathlib import Path

from tokenprune.evals.table import Row, Table

STYLES = {"naive": ("0.6", "x", ":"), "torch": ("black", "s", "--")}
QUANTITIES = {"ms": "ms a call", "extra_mb": "peak extra memory, MiB"}


def plot_kernels(table: Table, path: str | Path) -> None:
    """Draws a column for each operation of `table` (of `tokenprune.evals.kernel_bench`), time above and memory below.

    Naive and plain torch are grey and black, backends coloured; the dispatcher's choice is a filled marker.
    """
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(str(row["op"]) for row in table.rows))
    figure = Figure(figsize=(3.2 * len(operations) + 1.5, 6), layout="constrained")
    axes = figure.subplots(len(QUANTITIES), len(operations), squeeze=False, sharex=True)
    for column, operation in enumerate(operations):
        rows = [row for row in table.rows if row["op"] == operation]
        ways = list(dict.fromkeys(str(row["way"]) for row in rows))
        for line, (quantity, label) in enumerate(QUANTITIES.items()):
            axis = axes[line][column]
            for index, way in enumerate(ways):
                _draw(axis, [row for row in rows if row["way"] == way and row.get(quantity)], quantity, way, index)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title(operation, size=9)
        axes[0][column].legend(fontsize="x-small")
        axes[-1][column].set_xlabel("tokens")
    environment = table.environment
    shown = ", ".join(f"{name} {environment[name]}" for name in ("device", "threads", "dtype") if name in environment)
    figure.suptitle(f"{shown}; filled: the dispatcher's choice", size=9)
    figure.savefig(path, dpi=120)


def _draw(axis: object, rows: list[Row], quantity: str, way: str, index: int) -> None:
    colour, marker, style = STYLES.get(way, (f"C{index}", "o", "-"))
    tokens, values = [row["tokens"] for row in rows], [row[quantity] for row in rows]
    plain = {"color": colour, "marker": marker, "linestyle": style, "markerfacecolor": "white", "linewidth": 1}
    axis.plot(tokens, values, label=way, **plain)  # type: ignore[attr-defined]
    chosen = [row for row in rows if row["chosen"]]
    axis.plot(  # type: ignore[attr-defined]
        [row["tokens"] for row in chosen],
        [row[quantity] for row in chosen],
        color=colour,
        marker=marker,
        linestyle="none",
    )
