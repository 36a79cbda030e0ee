"""The tables of a comparison of patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenprune.evals.arms import UNPATCHED, Arm
from tokenprune.evals.patterns.correlation import kendall, pearson, spearman
from tokenprune.evals.patterns.pairs import BUDGETS, METHODS, MODELS, Pair
from tokenprune.evals.patterns.pattern import Pattern
from tokenprune.evals.stats import Interval, percentile_ends
from tokenprune.evals.table import Row, interval_cells

EVERY_PAIR = "every pair"
FEWEST = 4
"""Points of which a correlation is computed."""
SYMMETRIC = ("iou", "v_measure", "js", "pcc", "scc", "sim", "emd", "cka", "procrustes", "pwcca")
"""What is correlated with the loss of accuracy."""


def summary_rows(
    patterns: Sequence[Pattern], arms: Sequence[Arm], score: str, mean: Callable[..., Interval]
) -> list[Row]:
    """A row a pattern: what it costs, how deep its patches are computed, how often the answer is right; and a row for
    each of `arms` that could not be run, with its reason.

    score: name of what is right. mean: of values [I] and their `support`, as `tokenprune.evals.stats.bootstrap_mean`.
    """
    rows: list[Row] = []
    for pattern in patterns:
        row = _names(pattern) | {"flops_ratio": pattern.flops_ratio}
        row |= interval_cells("depth", mean(pattern.depth.double().mean(1)))
        row["kept"] = float(pattern.kept(-1).double().mean())
        row["groups"] = pattern.merges
        if pattern.right is not None:
            row |= interval_cells(score, mean(pattern.right, support=(0.0, 1.0)))
            base = next(other for other in patterns if other.model == pattern.model)
            if pattern is not base and base.right is not None:
                row |= interval_cells("loss", mean(base.right.double() - pattern.right.double(), support=(-1.0, 1.0)))
        rows.append(row)
    return rows + [{"method": arm.method, "budget": arm.budget, "note": arm.note} for arm in arms if arm.model is None]


def pair_rows(pairs: Sequence[Pair], kind: str) -> list[Row]:
    """A row a pair and stage of its measures of that `kind`, such as "kept"; of those without stages a row a pair."""
    rows: list[Row] = []
    for pair in pairs:
        found: dict[str, Tensor] = getattr(pair, kind)
        staged = any(draws.ndim == 2 for draws in found.values())
        for stage in range(len(pair.first.stages)) if staged else range(bool(found)):
            row = _pair_names(pair)
            if staged:
                row["block"] = _blocks(pair, stage)
            for name, draws in found.items():
                row |= _cells(name, draws[stage] if staged else draws, centred=kind in ("depth", "features"))
            rows.append(row)
    return rows


def correlation_rows(pairs: Sequence[Pair], anchors: Sequence[str], weights: Tensor) -> list[Row]:
    """A row for each measure, stage and set of pairs: its correlation with the loss of accuracy over those pairs.

    Against an anchor (the unpatched model is always one) the loss is the anchor's accuracy minus the other's; between
    budgets that of the larger minus that of the smaller; over every pair, and between models, the difference without
    sign. Sets of fewer than four pairs are left out. Empty where there is no accuracy.
    """
    rows: list[Row] = []
    for model in dict.fromkeys(pair.first.model for pair in pairs):
        own = [pair for pair in pairs if pair.first.model == model]
        for against, budget, chosen in _sets(own, anchors):
            for name in SYMMETRIC:
                having = [pair for pair in chosen if name in pair.measures and pair.first.right is not None]
                if len(having) < FEWEST:
                    continue
                row: Row = {"model": model, "against": against, "budget": budget, "measure": name, "pairs": len(having)}
                lost = torch.stack([loss_of(pair, against, weights) for pair in having], -1)
                draws = torch.stack([pair.measures[name] for pair in having], -1)
                if draws.ndim == 2:
                    rows.append(row | _coefficients(draws, lost))
                for stage, values in enumerate(draws if draws.ndim == 3 else ()):
                    rows.append(row | {"block": _blocks(having[0], stage)} | _coefficients(values, lost))
    return rows


def accuracy(pattern: Pattern, weights: Tensor) -> Tensor:
    """Share of right answers in each sample of images: [samples]."""
    assert pattern.right is not None
    return weights @ pattern.right.double() / weights.sum(1)


def _sets(pairs: Sequence[Pair], anchors: Sequence[str]) -> Iterator[tuple[str, str, list[Pair]]]:
    """(against what, at which budget, the pairs) for each set of pairs of one model."""
    at_one_budget = [pair for pair in pairs if pair.across in (METHODS, UNPATCHED)]
    for against in (UNPATCHED, *anchors, EVERY_PAIR):
        if against == EVERY_PAIR:
            chosen = [pair for pair in at_one_budget if pair.across == METHODS]
        else:
            chosen = [pair for pair in at_one_budget if against in (pair.first.method, pair.second.method)]
            if against != UNPATCHED:
                chosen = [pair for pair in chosen if pair.across == METHODS]
        budgets = list(dict.fromkeys(pair.second.budget for pair in chosen))
        for budget in budgets if len(budgets) > 1 else ():
            yield against, budget, [pair for pair in chosen if pair.second.budget == budget]
        yield against, "all" if len(budgets) > 1 else "".join(budgets), chosen
    for across in (BUDGETS, MODELS):
        yield f"other {across}", "", [pair for pair in pairs if pair.across == across]


def loss_of(pair: Pair, against: str, weights: Tensor) -> Tensor:
    """The loss of accuracy that goes with `pair` in the set of that name, in each sample of images: [samples]."""
    lost = accuracy(pair.first, weights) - accuracy(pair.second, weights)
    if against in (EVERY_PAIR, f"other {MODELS}"):
        return lost.abs()
    return -lost if against == pair.second.method != pair.first.method else lost


def _coefficients(values: Tensor, lost: Tensor) -> Row:
    """Of values [samples, pairs] and losses of at least as many samples; Kendall's without an interval."""
    lost = lost[: len(values)]
    cells = _cells("spearman", spearman(values, lost)) | _cells("pearson", pearson(values, lost))
    return {**cells, "kendall": kendall(values[0], lost[0])}


def _names(pattern: Pattern) -> Row:
    return {"model": pattern.model, "method": pattern.method, "budget": pattern.budget}


def _pair_names(pair: Pair) -> Row:
    first, second = pair.first, pair.second
    models = ("", "") if first.model == second.model else (f"{first.model}: ", f"{second.model}: ")
    return {
        "model": first.model if first.model == second.model else None,
        "across": pair.across,
        "first": models[0] + first.label,
        "second": models[1] + second.label,
    }


def _blocks(pair: Pair, stage: int) -> str:
    return " / ".join(dict.fromkeys(str(pattern.stages[stage]) for pattern in (pair.first, pair.second)))


def _cells(name: str, draws: Tensor, *, centred: bool = False) -> Row:
    """The estimate and, where there are bootstrap samples, its interval."""
    row: Row = {name: float(draws[0])}
    if len(draws) > 1:
        low, high = percentile_ends(draws, centred=centred)
        row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return row
