"""Which patterns are compared with which, and every measure of each pair, on the same bootstrap samples of images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.evals.arms import UNPATCHED
from tokenprune.evals.patterns.clusters import cluster_agreement
from tokenprune.evals.patterns.correlation import pearson, spearman
from tokenprune.evals.patterns.depth import emd, js, kl, similarity
from tokenprune.evals.patterns.features import linear_cka, procrustes, pwcca
from tokenprune.evals.patterns.overlap import ioa, iou
from tokenprune.evals.patterns.pattern import Pattern
from tokenprune.evals.progress import progress

FEATURE_RESAMPLES = 100
METHODS, BUDGETS, MODELS = "methods", "budgets", "models"


@dataclass
class Pair:
    """Two patterns and their measures: samples of the estimate, the first of all images, [samples] or [S, samples].

    across: what differs, "methods" at one budget, "budgets" of one method, "models" under one method and budget, or
    "unpatched" where the first is the unpatched model, of which only features are compared.
    """

    first: Pattern
    second: Pattern
    across: str
    kept: dict[str, Tensor] = field(default_factory=dict)
    clusters: dict[str, Tensor] = field(default_factory=dict)
    depth: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def measures(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {**self.kept, **self.clusters, **self.depth, **self.features}


def pair_up(patterns: Sequence[Pattern], anchors: Sequence[str]) -> list[Pair]:
    """The pairs that "Which Tokens to Use?" compares: methods at one budget, budgets of a method, models, and each with
    the unpatched model. Methods in `anchors` come first in theirs, and of two budgets the one that keeps more."""
    rank = {method: number for number, method in enumerate((UNPATCHED, *anchors))}
    ordered = sorted(patterns, key=lambda pattern: rank.get(pattern.method, len(rank)))
    pairs = []
    for first, second in itertools.combinations(ordered, 2):
        same = (first.model == second.model, first.method == second.method, first.budget == second.budget)
        if same == (True, True, False) and first.depth.sum() < second.depth.sum():
            first, second = second, first
        across = {(True, False, True): METHODS, (True, True, False): BUDGETS, (False, True, True): MODELS}.get(same)
        if same[0] and first.method == UNPATCHED:
            across = UNPATCHED
        if across is not None:
            pairs.append(Pair(first, second, across))
    return pairs


def measure_pairs(
    pairs: Sequence[Pair], weights: Tensor, wanted: Sequence[str], *, show_progress: bool = False
) -> None:
    """Fills in the `wanted` measures of `pairs`, such as "kept". weights: [samples, I] of
    `tokenprune.evals.stats.resample_weights`."""
    shares = weights / weights.sum(1, keepdim=True)
    maps = {id(pattern): shares @ pattern.depth.double() for pair in pairs for pattern in (pair.first, pair.second)}
    for pair in progress(pairs, "pairs", show=show_progress):
        if UNPATCHED not in (pair.first.method, pair.second.method):
            if "kept" in wanted:
                pair.kept = _kept(pair, shares)
            if "clusters" in wanted:
                pair.clusters = _clusters(pair, shares)
            if "depth" in wanted:
                pair.depth = _depth(maps[id(pair.first)], maps[id(pair.second)], pair.first.grid)
        if "features" in wanted:
            samples = weights[: 1 + FEATURE_RESAMPLES] if pair.across == UNPATCHED else weights[:1]
            pair.features = _features(pair, samples)


def _kept(pair: Pair, shares: Tensor) -> dict[str, Tensor]:
    stages = range(len(pair.first.stages))
    kept = [torch.stack([pattern.kept(stage) for stage in stages], 1) for pattern in (pair.first, pair.second)]
    return {name: (shares @ measure(*kept)).T for name, measure in (("iou", iou), ("ioa", ioa))}


def _clusters(pair: Pair, shares: Tensor) -> dict[str, Tensor]:
    """None where one of the two makes no groups: then there is no cluster map."""
    if not (pair.first.merges and pair.second.merges):
        return {}
    found = cluster_agreement(pair.first.groups, pair.second.groups)
    return {name: _mean_of_known(values, shares) for name, values in found._asdict().items()}


def _mean_of_known(values: Tensor, shares: Tensor) -> Tensor:
    """[I, S] to [S, samples], over the images of which there is a value."""
    known = ~values.isnan()
    return ((shares @ values.where(known, 0.0)) / (shares @ known.double())).T


def _depth(first: Tensor, second: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Of mean depths [samples, N]. The earth mover's distance, a linear program, is of all images alone."""
    return {
        "kl": kl(first, second),
        "kl_back": kl(second, first),
        "js": js(first, second),
        "pcc": pearson(first, second),
        "scc": spearman(first, second),
        "sim": similarity(first, second),
        "emd": torch.tensor([emd(first[0], second[0], grid)]),
    }


def _features(pair: Pair, weights: Tensor) -> dict[str, Tensor]:
    """Empty without class tokens; without PWCCA where there are too few images for it."""
    first, second = pair.first.features, pair.second.features
    if first is None or second is None:
        return {}
    measures = {"cka": linear_cka, "procrustes": procrustes}
    if enough_for_pwcca(pair.first) and enough_for_pwcca(pair.second):
        measures["pwcca"] = pwcca
    found = {}
    for name, measure in measures.items():
        stages = [
            [measure(first[:, stage], second[:, stage], sample) for sample in weights]
            for stage in range(first.shape[1])
        ]
        found[name] = torch.tensor(stages, dtype=torch.float64)
    return found


def enough_for_pwcca(pattern: Pattern) -> bool:
    """Whether there are more images than channels, and not only in the whole sample: a bootstrap sample of I images has
    about 0.63 I different ones."""
    features = pattern.features
    return features is not None and 0.6 * features.shape[0] > features.shape[2]
