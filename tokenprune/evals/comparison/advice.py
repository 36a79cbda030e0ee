"""What a comparison advises: the fastest rows that cost no measurable quality, and the best at each budget."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.evals.arms import DROP_BASELINES, SMALLER_INPUT, UNPATCHED
from tokenprune.evals.table import Row

QUALITIES = ("top1", "knn", "saliency", "agreement", "cosine")
LOSS = 0.01
NAMES = {"top1": "top-1", "knn": "k-NN", "saliency": "saliency correlation", "cosine": "feature cosine"}


def quality_column(rows: Sequence[Row]) -> str:
    """The column by which rows are judged: accuracy where there are labels, else agreement with the unpatched model, or
    the correlation of its maps, or the cosine of its features."""
    return next(name for name in QUALITIES if any(row.get(name) is not None for row in rows))


def frontier(rows: Sequence[Row], quality: str) -> list[int]:
    """Which rows no other is both as fast and as good as, by their estimates, from the slowest on."""
    measured = [
        i for i, row in enumerate(rows) if _value(row, quality) is not None and _value(row, "speedup") is not None
    ]
    best, kept = float("-inf"), list[int]()
    for i in sorted(measured, key=lambda i: (-(_value(rows[i], "speedup") or 0), -(_value(rows[i], quality) or 0))):
        value = _value(rows[i], quality)
        if value is not None and value > best:
            best, kept = value, [*kept, i]
    return kept[::-1]


def advised(rows: Sequence[Row], quality: str) -> list[str]:
    """Sentences: the fastest method within a hundredth of the unpatched model's quality, the one with the best quality
    at each budget, what the baselines give there, and what could not be believed."""
    base = next(row for row in rows if row["method"] == UNPATCHED)
    whole = _value(base, quality)
    assert whole is not None
    methods = [row for row in rows if row["method"] not in (UNPATCHED, SMALLER_INPUT, *DROP_BASELINES)]
    measured = [row for row in methods if _measured(row, quality)]
    if not measured:
        return ["No method could be run here; the notes in the table say why."]
    said = [_fastest(measured, quality, whole)]
    for budget in dict.fromkeys(row["budget"] for row in measured):
        best = max((r for r in measured if r["budget"] == budget), key=lambda r: (r[quality], r["speedup"]))
        others = [
            f"{row['method']} {row[quality]:.3f} at {row['speedup']:.2f} times"
            for row in rows
            if row["budget"] == budget and row["method"] in (SMALLER_INPUT, *DROP_BASELINES) and _measured(row, quality)
        ]
        beside = f" Beside it: {', '.join(others)}." if others else ""
        said.append(f"At {budget} the best is {_told(best, quality)}.{beside}")
    doubtful = sum(row.get("trusted") is False for row in measured)
    if doubtful:
        said.append(
            f"{doubtful} of {len(measured)} speeds are not to be believed: the unpatched model against itself was off"
            " by more than 2%, as the machine was not quiet. Measure again with nothing else running."
        )
    return said


def _fastest(rows: Sequence[Row], quality: str, whole: float) -> str:
    stands = f"the unpatched model's {NAMES.get(quality, quality)} of {whole:.3f}"
    near = [row for row in rows if (_value(row, quality) or 0.0) >= whole - LOSS]
    if not near:
        return f"No method stays within {LOSS:g} of {stands} at these budgets."
    best = max(near, key=lambda row: row["speedup"])  # type: ignore[arg-type,return-value]
    if (_value(best, "speedup") or 0.0) <= 1.0:
        return (
            f"No method that stays within {LOSS:g} of {stands} is faster than no"
            f" method here; the nearest is {_told(best, quality)}."
        )
    return (
        f"Fastest within {LOSS:g} of {stands}: {_told(best, quality)}, by"
        f" patch(model, {best['method']!r}, {best['budget']})."
    )


def _told(row: Row, quality: str) -> str:
    return f"{row['method']} at {row['budget']} with {row[quality]:.3f} at {row['speedup']:.2f} times the speed"


def _measured(row: Row, quality: str) -> bool:
    return _value(row, quality) is not None and _value(row, "speedup") is not None


def _value(row: Row, name: str) -> float | None:
    cell = row.get(name)
    return float(cell) if isinstance(cell, (int, float)) else None
