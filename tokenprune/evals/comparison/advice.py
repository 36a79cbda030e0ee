"""What a comparison advises: the fastest rows that cost no measurable quality, and the best at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenprune
from tokenprune.evals.arms import UNPATCHED, budget_label, is_baseline
from tokenprune.evals.table import Row
from tokenprune.registry import has_threshold, make_method, method_names


@dataclass(frozen=True)
class Quality:
    """A column by which rows are judged: what it is called, how much of it may be lost for nothing to be lost, and
    whether less is better."""

    column: str
    name: str
    loss: float = 0.01
    lower: bool = False

    def of(self, row: Row) -> float | None:
        """The value of a row, so that more is better."""
        value = _value(row, self.column)
        return None if value is None else -value if self.lower else value


QUALITIES = (
    Quality("top1", "top-1"),
    Quality("miou", "mean IoU"),
    Quality("knn", "k-NN"),
    Quality("saliency", "saliency correlation"),
    Quality("frechet", "Fréchet distance", loss=0.1, lower=True),
    Quality("accuracy", "digits recognised"),
    Quality("recognition", "digits named"),
    Quality("localisation", "digits found"),
    Quality("agreement", "agreement"),
    Quality("cosine", "feature cosine"),
)


def qualities(rows: Sequence[Row]) -> list[Quality]:
    """What rows may be judged by, accuracy first where there are labels: what the unpatched model has as well."""
    base = next(row for row in rows if row["method"] == UNPATCHED)
    return [quality for quality in QUALITIES if quality.of(base) is not None]


def frontier(rows: Sequence[Row], quality: Quality) -> list[int]:
    """Which rows no other is both as fast and as good as, by their estimates, from the slowest on."""
    measured = [(speed, value, i) for i, row in enumerate(rows) for speed, value in _both(row, quality)]
    best, kept = float("-inf"), list[int]()
    for _, value, i in sorted(measured, key=lambda one: (-one[0], -one[1])):
        if value > best:
            best, kept = value, [*kept, i]
    return kept[::-1]


def advised(rows: Sequence[Row], quality: Quality) -> list[str]:
    """Sentences: the fastest method that loses nothing worth mentioning of the unpatched model's quality, and where it
    has learned for the model the fastest that need not; of those that are faster than the unpatched model the one with
    the best quality at each budget; what the baselines give there, and what could not be believed."""
    base = next(row for row in rows if row["method"] == UNPATCHED)
    measured = [row for row in rows if not is_baseline(str(row["method"])) and _both(row, quality)]
    if not measured:
        return ["No method could be run here; the notes in the table say why."]
    said = [_fastest(measured, quality, base)]
    learn = {info.name for info in tokenprune.methods() if "training" in info.needs}
    free = [row for row in measured if row["method"] not in learn]
    if free and (other := _fastest(free, quality, base)) != said[0]:
        said.append(f"It has learned for this model. Of those that learn nothing: {other}")
    for budget in dict.fromkeys(row["budget"] for row in measured):
        there = [row for row in measured if row["budget"] == budget]
        faster = [row for row in there if (_value(row, "speedup") or 0.0) > 1.0]
        best = max(faster or there, key=lambda row: _both(row, quality)[0][::-1])
        others = [
            f"{row['method']} {row[quality.column]:.3f} at {row['speedup']:.2f} times"
            for row in rows
            if row["budget"] == budget and is_baseline(str(row["method"])) and _both(row, quality)
        ]
        beside = f" Beside it: {', '.join(others)}." if others else ""
        which = "the best that is faster than no method is" if faster else "no method is faster than none, the best is"
        said.append(f"At {budget} {which} {_told(best, quality)}.{beside}")
    doubtful = sum(row.get("trusted") is False for row in measured)
    if doubtful:
        said.append(
            f"{doubtful} of {len(measured)} speeds are not to be believed: the unpatched model against itself was off"
            " by more than 2%, as the machine was not quiet. Measure again with nothing else running."
        )
    return said


def _fastest(rows: Sequence[Row], quality: Quality, base: Row) -> str:
    stands, whole = f"the unpatched model's {quality.name} of {base[quality.column]:.3f}", quality.of(base)
    assert whole is not None
    near = [row for row in rows if _both(row, quality)[0][1] >= whole - quality.loss]
    if not near:
        return f"No method stays within {quality.loss:g} of {stands} at these budgets."
    best = max(near, key=lambda row: _both(row, quality))
    if (_value(best, "speedup") or 0.0) <= 1.0:
        return (
            f"No method that stays within {quality.loss:g} of {stands} is faster than no"
            f" method here; the nearest is {_told(best, quality)}."
        )
    call = f", by {_call(best)}" if best["method"] in method_names() else ""
    return f"Fastest within {quality.loss:g} of {stands}: {_told(best, quality)}{call}."


def _call(row: Row) -> str:
    """What switches the method of a row on: where it adapts to each image, what was found to meet the budget."""
    name, budget = str(row["method"]), str(row["budget"])
    if not budget.startswith("flops=") or not make_method(name, {}).adaptive:
        return f"patch(model, {name!r}, {budget})"
    if has_threshold(name):
        return f"patch(model, schedule=tokenprune.calibrate(model, images, {name!r}, {budget}))"
    bound = str(row["note"]).split(",")[0]  # as `tokenprune.evals.calibrated_arms` notes it
    return f"patch(model, {name!r})" if bound == budget_label({}) else f"patch(model, {name!r}, {bound})"


def _told(row: Row, quality: Quality) -> str:
    low, high = (_value(row, f"{quality.column}_drop_{end}") for end in ("low", "high"))
    lost = "" if low is None or high is None else f" ({low:+.3f} to {high:+.3f} lost)"
    found = f"{row['method']} at {row['budget']} with {row[quality.column]:.3f}{lost}"
    return f"{found} at {row['speedup']:.2f} times the speed"


def _both(row: Row, quality: Quality) -> list[tuple[float, float]]:
    """The row's speed and quality, more being better of both; nothing where one of them is missing."""
    speed, value = _value(row, "speedup"), quality.of(row)
    return [] if speed is None or value is None else [(speed, value)]


def _value(row: Row, name: str) -> float | None:
    cell = row.get(name)
    return float(cell) if isinstance(cell, (int, float)) else None
