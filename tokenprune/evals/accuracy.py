"""What pruning costs: top-1, agreement and feature cosine of patched models beside the unpatched one, in one pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Arm, Budget, build_arms, runnable, tokens_left
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.evals.fidelity import agreement, correct, knn_correct, observe
from tokenprune.evals.progress import progress
from tokenprune.evals.saliency import feature_cosine, saliency_correlation
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells

Dense = Callable[[nn.Module, Tensor], Tensor]


def evaluate(
    model: nn.Module,
    data: object,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    transform: Transform | None = None,
    split: str | None = None,
    batch_size: int = 32,
    samples: int | None = None,
    workers: int = 0,
    seed: int = 0,
    baselines: bool = True,
    saliency: Dense | None = None,
    show_progress: bool = False,
) -> Table:
    """Runs the unpatched model and every method at every budget over `data` once, each batch through all of them.

    data, transform, split: as in `tokenprune.evals.data.open_data`; `transform=None` takes the one of timm's own
    configuration of the model. samples: of a subset drawn by `seed`. methods, budgets, baselines: as in `bench`.
    saliency: (model, images [B, C, H, W]) -> maps [B, ...], compared with the unpatched model's where it is given.

    Columns, each a mean over images with a 95% bootstrap interval: `top1` and `top1_drop` (paired, in points of share)
    where there are labels; `knn` in place of `top1` for a model without a classifier; `agreement` of the top-1 class
    with the unpatched model; `cosine` of the features that enter the classifier; `saliency` correlation. `flops_ratio`
    is the mean over the batches, `tokens` of the last one.

    Raises TokenPruneError as `bench` and `open_data` do.
    """
    images = open_data(data, transform or model_transform(model), split=split, num_classes=_classes(model))
    arms = _evaluate_arms(model, images, methods, budgets, batch_size, samples, seed, baselines)
    scores = [_Scores() for _ in arms]
    device, dtype = _placement(model)
    steps = math.ceil(images.count(samples) / batch_size)
    loader = images.batches(batch_size, samples=samples, seed=seed, workers=workers)
    for batch, labels in progress(loader, "eval", total=steps, show=show_progress):
        if labels is not None and int(labels.min()) < 0:
            raise TokenPruneError(f"{images.name} has images without a label; take a split whose labels are public")
        _score_batch(arms, scores, batch.to(device, dtype), None if labels is None else labels.to(device), saliency)
    rows = [_row(arm, score, scores[0], seed) for arm, score in zip(arms, scores, strict=True)]
    conditions: Row = {"data": images.name, "images": images.count(samples)}
    return Table(rows, conditions | environment(device, dtype))


def model_transform(model: nn.Module) -> Transform:
    """timm's evaluation transform for `model`: resize, crop and normalisation as it was trained with."""
    from timm.data import create_transform, resolve_model_data_config

    transform: Transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return transform


class _Scores:
    """Per-image values of one arm, a list of tensors [B] by column name."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.tokens: int | None = None

    def add(self, name: str, values: Tensor) -> None:
        self.values[name].append(values.double().cpu())

    def column(self, name: str) -> Tensor:
        return torch.cat(self.values[name])


def _evaluate_arms(
    model: nn.Module,
    images: ImageData,
    methods: Sequence[str] | None,
    budgets: Sequence[Budget],
    batch_size: int,
    samples: int | None,
    seed: int,
    baselines: bool,
) -> list[Arm]:
    device, dtype = _placement(model)
    example, _ = next(iter(images.batches(min(2, batch_size), samples=samples, seed=seed)))
    return build_arms(model, example.to(device, dtype), methods, budgets, baselines=baselines)


def _score_batch(
    arms: Sequence[Arm], scores: Sequence[_Scores], images: Tensor, labels: Tensor | None, saliency: Dense | None
) -> None:
    base = arms[0].model
    assert base is not None
    reference = observe(base, images)
    with_classes = reference.logits is not reference.features
    maps = None if saliency is None else saliency(base, images)
    for index, arm, model in runnable(arms):
        score, inputs = scores[index], arm.prepare(images)
        seen = reference if index == 0 else observe(model, inputs)
        if labels is not None and with_classes:
            score.add("top1", correct(seen.logits, labels))
        elif labels is not None:
            score.features.append(seen.features.float().cpu())
            score.labels.append(labels.cpu())
        if with_classes:
            score.add("agreement", agreement(seen.logits, reference.logits))
        score.add("cosine", feature_cosine(seen.features, reference.features))
        if index and arm.size is None:
            score.tokens = tokens_left(model)
            ratio = tokenprune.report(model).to_dict()["flops_ratio"]
            score.add("flops_ratio", torch.full((len(images),), ratio))
        if maps is not None and saliency is not None:
            found = maps if index == 0 else saliency(model, inputs)
            found = functional.interpolate(found, maps.shape[-2:], mode="bilinear", align_corners=False)
            score.add("saliency", saliency_correlation(found, maps))


def _row(arm: Arm, score: _Scores, base: _Scores, seed: int) -> Row:
    adaptive = score.values.pop("flops_ratio", None)
    ratio = arm.flops_ratio if adaptive is None else float(torch.cat(adaptive).mean())
    row: Row = {"method": arm.method, "budget": arm.budget, "flops_ratio": ratio, "tokens": score.tokens}
    if score.features:
        score.add("knn", knn_correct(torch.cat(score.features), torch.cat(score.labels)))
    for name in ("top1", "knn", "agreement", "cosine", "saliency"):
        if name not in score.values:
            continue
        row |= _cells(name, score.column(name), seed)
        if name in ("top1", "knn") and score is not base:
            row |= _cells(f"{name}_drop", base.column(name) - score.column(name), seed)
    return {**row, "note": arm.note}


def _cells(name: str, values: Tensor, seed: int) -> Row:
    found = bootstrap_mean(values, seed=seed)
    return interval_cells(name, found.estimate, found.low, found.high)


def _classes(model: nn.Module) -> int | None:
    return getattr(model, "num_classes", None) or None


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
