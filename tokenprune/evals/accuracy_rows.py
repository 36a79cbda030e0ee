"""The rows of `tokenprune.evals.evaluate`: what each image of a batch gives, and the columns that come of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Arm, runnable, tokens_left
from tokenprune.evals.data import ImageData
from tokenprune.evals.fidelity import Observation, agreement, correct, observe
from tokenprune.evals.knn import knn_predict
from tokenprune.evals.saliency import feature_cosine, saliency_correlation
from tokenprune.evals.segmentation import bootstrap_iou, interval_of, overlaps
from tokenprune.evals.stats import bootstrap_mean, bootstrap_share
from tokenprune.evals.table import Row, interval_cells

Dense = Callable[[nn.Module, Tensor], Tensor]
NEIGHBOURS = 10
TOP = 5
SUPPORT = {"top1": (0.0, 1.0), "top5": (0.0, 1.0), "knn": (0.0, 1.0), "agreement": (0.0, 1.0)}


@dataclass(frozen=True)
class UnpatchedBatch:
    """Images [B, C, H, W], their labels [B] where there are any, what the unpatched model gave, and its maps where they
    are compared."""

    images: Tensor
    labels: Tensor | None
    seen: Observation
    maps: Tensor | None


@dataclass
class Scores:
    """What one arm gave: values by column name [B], features [B, D] where neighbours are looked for, and tokens left
    in the last batch. is_test: [B], which images were classified by neighbours."""

    values: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    tokens: int | None = None
    is_test: Tensor | None = None

    def add(self, name: str, values: Tensor) -> None:
        """Take in a column."""
        self.values[name] = values.double().cpu()

    def classify_by_neighbours(self, labels: Tensor, is_test: Tensor) -> None:
        """Take in `knn`: which of `is_test` [B] the others put into their class, of labels [B]."""
        assert self.features is not None
        gallery = self.features[~is_test]
        predicted = knn_predict(gallery, labels[~is_test], self.features[is_test], k=min(NEIGHBOURS, len(gallery)))
        self.add("knn", predicted == labels[is_test])
        self.is_test = is_test


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of one arm in all batches."""
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    features = [part.features for part in parts if part.features is not None]
    return Scores(values, torch.cat(features) if features else None, parts[-1].tokens)


def score_batch(arms: Sequence[Arm], batch: UnpatchedBatch, saliency: Dense | None) -> list[Scores]:
    """What each arm gives on a batch; nothing where it could not be built."""
    base, reference, maps, scores = arms[0].model, batch.seen, batch.maps, [Scores() for _ in arms]
    assert base is not None
    for arm, model, score in runnable(arms, scores):
        inputs = arm.prepare(batch.images)
        seen = reference if model is base else on_grid(observe(model, inputs), batch.labels)
        if classifies(base):
            score.add("agreement", agreement(seen.logits, reference.logits))
            if batch.labels is not None and batch.labels.ndim > 1:
                logits = seen.logits.cpu()
                score.add("overlaps", overlaps(logits.argmax(1), batch.labels, logits.shape[1]))
            elif batch.labels is not None:
                score.add("top1", correct(seen.logits.cpu(), batch.labels))
                if seen.logits.shape[1] > 2 * TOP:
                    score.add("top5", correct(seen.logits.cpu(), batch.labels, among=TOP))
        elif batch.labels is not None:
            score.features = seen.features.float().cpu()
        score.add("cosine", feature_cosine(seen.features, reference.features))
        if maps is not None and saliency is not None:
            found = maps if model is base else saliency(model, inputs)
            found = functional.interpolate(found, maps.shape[-2:], mode="bilinear", align_corners=False)
            score.add("saliency", saliency_correlation(found, maps))
        if arm.is_patched:
            score.tokens = tokens_left(model)
            ratio = tokenprune.report(model).to_dict()["flops_ratio"]
            score.add("flops_ratio", torch.full((len(inputs),), ratio))
    return scores


def on_grid(seen: Observation, labels: Tensor | None) -> Observation:
    """Maps of logits [B, classes, ...] brought to the size of maps of labels, where these are some.

    Raises TokenPruneError where one is a map and the other a class.
    """
    if labels is None:
        return seen
    if (labels.ndim > 1) != (seen.logits.ndim == 4):
        told = "a class for each place" if labels.ndim > 1 else "one class for each image"
        raise TokenPruneError(f"the labels are {told}, and the model gives logits [B, {_sides(seen.logits)}]")
    if labels.ndim == 1:
        return seen
    maps = functional.interpolate(seen.logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    return Observation(maps.flatten(1), maps)


def _sides(logits: Tensor) -> str:
    return ", ".join(map(str, logits.shape[1:]))


def row_of(arm: Arm, score: Scores, base: Scores, groups: Tensor | None, seed: int) -> Row:
    """The columns of `evaluate` of one arm; base: of the unpatched one. groups: as in `bootstrap_mean`."""
    measured = "flops_ratio" in score.values
    ratio = float(score.values["flops_ratio"].mean()) if measured else arm.flops_ratio
    row: Row = {"method": arm.method, "budget": arm.budget, "flops_ratio": ratio, "tokens": score.tokens}
    if "overlaps" in score.values:
        row |= _iou_cells(score.values["overlaps"], base.values["overlaps"], score is base, groups, seed)
    for name in ("top1", "top5", "knn", "agreement", "cosine", "saliency"):
        if name not in score.values:
            continue
        values = score.values[name]
        members = groups[score.is_test] if name == "knn" and groups is not None else groups
        if score is base and name in ("agreement", "cosine", "saliency"):
            row[name] = 1.0  # the unpatched model against itself
            continue
        row |= _interval(name, values, members, SUPPORT.get(name), seed)
        if name in ("top1", "knn"):
            drop = _interval(f"{name}_drop", base.values[name] - values, members, (-1.0, 1.0), seed)
            kept = bootstrap_share(values, base.values[name], groups=members, seed=seed)
            drop |= interval_cells(f"{name}_kept", kept)
            row |= drop if score is not base else dict.fromkeys(drop)
    return {**row, "note": _note(arm, score)}


def _iou_cells(counts: Tensor, base: Tensor, is_base: bool, groups: Tensor | None, seed: int) -> Row:
    found, draws = bootstrap_iou(counts, groups=groups, seed=seed)
    _, whole = bootstrap_iou(base, groups=groups, seed=seed)
    drop = interval_cells("miou_drop", interval_of(whole - draws))
    drop |= interval_cells("miou_kept", interval_of(draws / whole))
    return interval_cells("miou", found) | (dict.fromkeys(drop) if is_base else drop)


def _note(arm: Arm, score: Scores) -> str | None:
    """The arm's own, and on how many images it gave no number."""
    if "cosine" not in score.values:
        return arm.note
    cosines = score.values["cosine"]
    lost = int(cosines.isnan().sum())
    told = [arm.note, f"NaN on {lost} of {len(cosines)} images" if lost else None]
    return "; ".join(part for part in told if part) or None


def _interval(name: str, values: Tensor, groups: Tensor | None, support: tuple[float, float] | None, seed: int) -> Row:
    found = bootstrap_mean(values, groups=groups, support=support, seed=seed)
    return interval_cells(name, found)


def split(images: ImageData, chosen: Tensor, seed: int) -> Tensor:
    """Which of the chosen images are classified by the others: the data's own split, or three in ten by `seed`."""
    if images.is_test is not None:
        return images.is_test[chosen]
    return torch.rand(len(chosen), generator=torch.Generator().manual_seed(seed)) < 0.3


def classifies(model: nn.Module) -> bool:
    """Whether the output is one score a class; timm's models without a classifier have num_classes 0."""
    return getattr(model, "num_classes", None) != 0
