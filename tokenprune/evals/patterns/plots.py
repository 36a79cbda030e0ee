"""Plots of a comparison of patterns, as PNG or SVG by the suffix of their path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from tokenprune.evals.arms import UNPATCHED
from tokenprune.evals.patterns.depth import survival
from tokenprune.evals.patterns.pairs import METHODS, Pair
from tokenprune.evals.patterns.pattern import Pattern
from tokenprune.evals.patterns.tables import EVERY_PAIR, loss_of

DPI = 100


def plot_all(patterns: Sequence[Pattern], pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """Every plot that these have something for, one of each model and budget where there are several; the files."""
    made = []
    for model in dict.fromkeys(pattern.model for pattern in patterns):
        own = [pattern for pattern in patterns if pattern.model == model]
        ours = [pair for pair in pairs if pair.first.model == model == pair.second.model]
        mark = f"-{_plain(model)}" if len({pattern.model for pattern in patterns}) > 1 else ""
        for budget in dict.fromkeys(pattern.budget for pattern in own if pattern.budget):
            at_budget = [pair for pair in ours if pair.across == METHODS and pair.first.budget == budget]
            for kind, name in (("kept", "iou"), ("clusters", "v_measure")):
                if any(name in pair.measures for pair in at_budget):
                    made.append(folder / f"{kind}{mark}-{_plain(budget)}.png")
                    plot_matrix(at_budget, name, made[-1])
        made.append(folder / f"depth{mark}.png")
        plot_depth([pattern for pattern in own if pattern.method != UNPATCHED], made[-1])
        made.append(folder / f"survival{mark}.png")
        plot_survival([pattern for pattern in own if pattern.method != UNPATCHED], made[-1])
        if any(pair.features for pair in ours):
            made.append(folder / f"features{mark}.png")
            plot_features([pair for pair in ours if pair.across == UNPATCHED], made[-1])
        if all(pattern.right is not None for pattern in own) and any(pair.measures for pair in ours):
            made.append(folder / f"correlation{mark}.png")
            plot_correlation(ours, made[-1])
    return made


def plot_matrix(pairs: Sequence[Pair], measure: str, path: str | Path) -> None:
    """A method × method matrix of `measure` for each stage; white where a pair has none."""
    names = list(dict.fromkeys(pattern.method for pair in pairs for pattern in (pair.first, pair.second)))
    having = [pair for pair in pairs if measure in pair.measures]
    names = [name for name in names if any(name in (pair.first.method, pair.second.method) for pair in having)]
    stages = having[0].first.stages
    side = 1.2 + 0.24 * len(names)
    figure, axes = _panels(len(stages), min(len(stages), 2), side + 1, side + 0.6)
    for stage, (block, ax) in enumerate(zip(stages, axes, strict=True)):
        values = numpy.full((len(names), len(names)), numpy.nan)
        numpy.fill_diagonal(values, 1.0)
        for pair in having:
            first, second = (names.index(pattern.method) for pattern in (pair.first, pair.second))
            values[first, second] = values[second, first] = float(pair.measures[measure][stage, 0])
        image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis")
        ax.set_title(f"behind block {block}", size=9)
        ax.set_xticks(range(len(names)), names, rotation=90, size=7)
        ax.set_yticks(range(len(names)), names, size=7)
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.suptitle(f"{measure}, {having[0].first.budget}", size=10)
    figure.savefig(path, dpi=DPI)


def plot_depth(patterns: Sequence[Pattern], path: str | Path) -> None:
    """For each pattern a map of how many blocks the token of each place leaves, in the mean over the images."""
    figure, axes = _panels(len(patterns), 6, 1.7, 1.75)
    for pattern, ax in zip(patterns, axes, strict=True):
        image = ax.imshow(pattern.depth.double().mean(0).reshape(pattern.grid).numpy(), vmin=0, vmax=pattern.blocks)
        ax.set_title(f"{pattern.method}\n{pattern.budget}", size=7)
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, shrink=0.5, label=f"mean depth, of {patterns[0].blocks} blocks")
    figure.savefig(path, dpi=DPI)


def plot_survival(patterns: Sequence[Pattern], path: str | Path) -> None:
    """For each pattern a strip of maps, one a stage: the share of images in which the token of each place leaves it."""
    stages = patterns[0].stages
    figure, axes = _panels(len(patterns), 3, 1.1 * len(stages), 1.3)
    for pattern, ax in zip(patterns, axes, strict=True):
        shares = survival(pattern.depth, pattern.blocks)
        maps = [shares[block].reshape(pattern.grid).numpy() for block in stages]
        gap = numpy.full((pattern.grid[0], 1), numpy.nan)
        strip = [part for shown in maps for part in (shown, gap)][:-1]
        image = ax.imshow(numpy.concatenate(strip, 1), vmin=0, vmax=1)
        ax.set_title(pattern.label, size=7)
        ax.set_axis_off()
    figure.colorbar(image, ax=axes, shrink=0.5, label="share of the images")
    figure.suptitle(f"behind blocks {', '.join(map(str, stages))}", size=9)
    figure.savefig(path, dpi=DPI)


def plot_features(pairs: Sequence[Pair], path: str | Path) -> None:
    """How like the unpatched model's class tokens those of each pattern are, stage by stage: a panel a measure."""
    measures = list(pairs[0].features)
    figure, axes = _panels(len(measures), len(measures), 3.6, 4.2)
    budgets = list(dict.fromkeys(pair.second.budget for pair in pairs))
    methods = list(dict.fromkeys(pair.second.method for pair in pairs))
    for measure, ax in zip(measures, axes, strict=True):
        for pair in pairs:
            style = ("-", "--", ":", "-.")[budgets.index(pair.second.budget) % 4]
            colour = f"C{methods.index(pair.second.method) % 10}"
            stages = pair.second.stages
            lines = ax.plot(stages, pair.features[measure][:, 0].tolist(), style, color=colour, linewidth=1)
            if measure == measures[0]:
                lines[0].set_label(pair.second.label)
        ax.set(title=measure, xlabel="behind block", xticks=stages)
        ax.grid(alpha=0.3)
    figure.legend(fontsize=6, loc="outside right upper")
    figure.suptitle("class tokens beside the unpatched model's", size=10)
    figure.savefig(path, dpi=DPI)


def plot_correlation(pairs: Sequence[Pair], path: str | Path) -> None:
    """The loss of accuracy over each measure behind the last block: of class features between each pattern and the
    unpatched model, of the others between every pair of methods at one budget, a colour a budget."""
    between = [pair for pair in pairs if pair.across == METHODS]
    unpatched = [pair for pair in pairs if pair.across == UNPATCHED]
    panels = [(name, between, EVERY_PAIR) for name in ("iou", "v_measure", "js", "scc", "emd")]
    panels += [(name, unpatched, UNPATCHED) for name in ("cka", "procrustes", "pwcca")]
    panels = [panel for panel in panels if any(panel[0] in pair.measures for pair in panel[1])]
    figure, axes = _panels(len(panels), 4, 2.7, 2.5)
    everyone = torch.ones(1, len(pairs[0].first.depth), dtype=torch.float64)
    for (name, chosen, against), ax in zip(panels, axes, strict=True):
        for budget in dict.fromkeys(pair.second.budget for pair in chosen):
            points = [pair for pair in chosen if pair.second.budget == budget and name in pair.measures]
            values = [float(pair.measures[name].reshape(-1, pair.measures[name].shape[-1])[-1, 0]) for pair in points]
            losses = [float(loss_of(pair, against, everyone)) for pair in points]
            ax.scatter(values, losses, s=8, alpha=0.7, label=budget)
        ax.set_title(name if against == EVERY_PAIR else f"{name}, with the unpatched", size=8)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("difference or loss of accuracy", size=8)
    axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=DPI)


def _panels(count: int, across: int, width: float, height: float) -> Any:
    """A figure of `count` axes, at most `across` in a row, each of that size in inches; the axes in a flat array."""
    from matplotlib.figure import Figure

    rows = math.ceil(count / across)
    figure = Figure(figsize=(width * min(across, count) + 1, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, min(across, count), squeeze=False).ravel()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _plain(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)
