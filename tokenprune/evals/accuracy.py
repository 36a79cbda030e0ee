"""What pruning costs: top-1, agreement and feature cosine of patched models beside the unpatched one, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Arm, Budget, build_arms, runnable, tokens_left
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.evals.fidelity import Observation, agreement, correct, observe
from tokenprune.evals.knn import knn_predict
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ALONE, Ranks, ranks
from tokenprune.evals.saliency import feature_cosine, saliency_correlation
from tokenprune.evals.segmentation import bootstrap_iou, interval_of, overlaps
from tokenprune.evals.stats import bootstrap_mean, bootstrap_share
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.transforms import model_transform

Dense = Callable[[nn.Module, Tensor], Tensor]
NEIGHBOURS = 10
TOP = 5
SUPPORT = {"top1": (0.0, 1.0), "top5": (0.0, 1.0), "knn": (0.0, 1.0), "agreement": (0.0, 1.0)}


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

    Columns, each a mean over images with a 95% bootstrap interval: `top1`, `top1_drop` (paired, as a share) and
    `top1_kept` (what is left of the unpatched `top1`, paired, as a share of it) where there are labels, `top5` where
    there are more than ten classes; `miou`, `miou_drop` and `miou_kept` where the labels are maps [h, w] and the model
    gives maps of logits (255 and negative labels do not count); `knn`, `knn_drop` and `knn_kept` in their place for a
    model without a classifier (10 neighbours); `agreement` of the top-1 class with the unpatched model; `cosine` of the
    features that enter the classifier; `saliency` correlation.
    `flops_ratio` is the mean over the batches, `tokens` of the last one. On how many images a row gave NaN is in its
    `note`.

    In several processes (torchrun, `accelerate launch`) each of which calls this alike, batches are shared out, and all
    of them get the table that one process gives, see `tokenprune.evals.ranks`.

    Raises TokenPruneError as `bench` and `open_data` do, and where another process has died.
    """
    with ranks():
        images = open_data(
            data, transform or model_transform(model), split=split, num_classes=getattr(model, "num_classes", None)
        )
        device, dtype = placement(model)
        example, _ = next(images.batches(2, samples=samples, seed=seed))
        arms = build_arms(
            model,
            example.to(device, dtype),
            methods,
            budgets,
            baselines=baselines,
            dense=saliency is not None or images.dense,
        )
        return evaluate_arms(
            arms,
            images,
            batch_size=batch_size,
            samples=samples,
            workers=workers,
            seed=seed,
            saliency=saliency,
            show_progress=show_progress,
        )


def evaluate_arms(
    arms: Sequence[Arm],
    images: ImageData,
    *,
    batch_size: int = 32,
    samples: int | None = None,
    workers: int = 0,
    seed: int = 0,
    saliency: Dense | None = None,
    show_progress: bool = False,
) -> Table:
    """The table of `evaluate` for arms that are built already, the unpatched one first."""
    with ranks() as processes:
        batches = run_unpatched(
            arms[0],
            images,
            batch_size=batch_size,
            samples=samples,
            workers=workers,
            seed=seed,
            saliency=saliency,
            show_progress=show_progress,
            processes=processes,
        )
        return compare(arms, batches, images, samples=samples, seed=seed, saliency=saliency, processes=processes)


@dataclass(frozen=True)
class UnpatchedBatch:
    """Images [B, C, H, W], their labels [B] where there are any, what the unpatched model gave, and its maps where they
    are compared."""

    images: Tensor
    labels: Tensor | None
    seen: Observation
    maps: Tensor | None


def run_unpatched(
    base: Arm,
    images: ImageData,
    *,
    batch_size: int = 32,
    samples: int | None = None,
    workers: int = 0,
    seed: int = 0,
    saliency: Dense | None = None,
    show_progress: bool = False,
    processes: Ranks = ALONE,
) -> Iterator[UnpatchedBatch]:
    """The chosen of `images`, or this process's share of them, through the unpatched model, for `compare`; as a list it
    serves any number of times."""
    assert base.model is not None
    device, dtype = placement(base.model)
    total = len(processes.own(range(math.ceil(len(images.chosen(samples, seed)) / batch_size))))
    loader = images.batches(batch_size, samples=samples, seed=seed, workers=workers, processes=processes)
    show_progress = show_progress and processes.is_main
    for batch, labels in progress(loader, "eval", total=total, show=show_progress):
        if labels is not None and labels.ndim == 1 and int(labels.min()) < 0:
            raise TokenPruneError(f"{images.name} has images without a label; take a split whose labels are public")
        inputs = batch.to(device, dtype)
        with torch.inference_mode():
            maps = None if saliency is None else saliency(base.model, inputs)
            yield UnpatchedBatch(inputs, labels, _on_grid(observe(base.model, inputs), labels), maps)


def compare(
    arms: Sequence[Arm],
    batches: Iterable[UnpatchedBatch],
    images: ImageData,
    *,
    samples: int | None = None,
    seed: int = 0,
    saliency: Dense | None = None,
    processes: Ranks = ALONE,
) -> Table:
    """The table of `evaluate` for arms that are built already, the unpatched one first, on what `run_unpatched` gave
    with the same images, samples, seed and processes."""
    base = arms[0].model
    assert base is not None
    chosen = images.chosen(samples, seed)
    groups = None if images.groups is None else images.groups[chosen]

    def table(parts: list[tuple[list[_Scores], Tensor | None]]) -> Table:
        scores = [_joined([found[arm] for found, _ in parts]) for arm in range(len(arms))]
        answers = [labels for _, labels in parts if labels is not None]
        if answers and not classifies(base):
            is_test = _split(images, chosen, seed)
            for _, _, score in runnable(arms, scores):
                score.classify_by_neighbours(torch.cat(answers), is_test)
        rows = [_row(arm, score, scores[0], groups, seed) for arm, score in zip(arms, scores, strict=True)]
        conditions: Row = {"data": images.name, "images": len(chosen)}
        if groups is not None:
            conditions["independent groups"] = len(set(groups.tolist()))
        return Table(rows, conditions | processes.conditions() | environment(*placement(base)))

    seen = []
    for batch in batches:
        with torch.inference_mode():
            seen.append((_score_batch(arms, batch, saliency), batch.labels))
    return processes.joined(seen, table)


@dataclass
class _Scores:
    """What one arm gave: values by column name [B], features [B, D] where neighbours are looked for, and tokens left
    in the last batch. is_test: [B], which images were classified by neighbours."""

    values: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    tokens: int | None = None
    is_test: Tensor | None = None

    def add(self, name: str, values: Tensor) -> None:
        self.values[name] = values.double().cpu()

    def classify_by_neighbours(self, labels: Tensor, is_test: Tensor) -> None:
        assert self.features is not None
        gallery = self.features[~is_test]
        predicted = knn_predict(gallery, labels[~is_test], self.features[is_test], k=min(NEIGHBOURS, len(gallery)))
        self.add("knn", predicted == labels[is_test])
        self.is_test = is_test


def _joined(parts: Sequence[_Scores]) -> _Scores:
    """The scores of one arm in all batches."""
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    features = [part.features for part in parts if part.features is not None]
    return _Scores(values, torch.cat(features) if features else None, parts[-1].tokens)


def _score_batch(arms: Sequence[Arm], batch: UnpatchedBatch, saliency: Dense | None) -> list[_Scores]:
    base, reference, maps, scores = arms[0].model, batch.seen, batch.maps, [_Scores() for _ in arms]
    assert base is not None
    for arm, model, score in runnable(arms, scores):
        inputs = arm.prepare(batch.images)
        seen = reference if model is base else _on_grid(observe(model, inputs), batch.labels)
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


def _on_grid(seen: Observation, labels: Tensor | None) -> Observation:
    """Maps of logits [B, classes, ...] brought to the size of maps of labels, where these are some."""
    if labels is None or labels.ndim == 1:
        return seen
    maps = functional.interpolate(seen.logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    return Observation(maps.flatten(1), maps)


def _row(arm: Arm, score: _Scores, base: _Scores, groups: Tensor | None, seed: int) -> Row:
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


def _note(arm: Arm, score: _Scores) -> str | None:
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


def _split(images: ImageData, chosen: Tensor, seed: int) -> Tensor:
    """Which of the chosen images are classified by the others: the data's own split, or three in ten by `seed`."""
    if images.is_test is not None:
        return images.is_test[chosen]
    return torch.rand(len(chosen), generator=torch.Generator().manual_seed(seed)) < 0.3


def classifies(model: nn.Module) -> bool:
    """Whether the output is one score a class; timm's models without a classifier have num_classes 0."""
    return getattr(model, "num_classes", None) != 0


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
