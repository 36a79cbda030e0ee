"""What pruning costs: top-1, agreement and feature cosine of patched models beside the unpatched one, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy_rows import (
    Dense,
    Scores,
    UnpatchedBatch,
    classifies,
    joined,
    on_grid,
    row_of,
    score_batch,
    split,
)
from tokenprune.evals.arms import Arm, Budget, build_arms, runnable
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.evals.fidelity import observe
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ALONE, Ranks, ranks
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.transforms import model_transform


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
    gives maps of logits, which are brought to that size (255 and negative labels do not count); `knn`, `knn_drop` and
    `knn_kept` in their place for a model without a classifier (10 neighbours); `agreement` of the top-1 class with the
    unpatched model; `cosine` of the features that enter the classifier; `saliency` correlation.
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
            yield UnpatchedBatch(inputs, labels, on_grid(observe(base.model, inputs), labels), maps)


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

    def table(parts: list[tuple[list[Scores], Tensor | None]]) -> Table:
        scores = [joined([found[arm] for found, _ in parts]) for arm in range(len(arms))]
        answers = [labels for _, labels in parts if labels is not None]
        if answers and not classifies(base):
            is_test = split(images, chosen, seed)
            if bool(is_test.all()):
                raise TokenPruneError(
                    f"{len(is_test)} of {images.name} are too few to have neighbours; take more samples"
                )
            for _, _, score in runnable(arms, scores):
                score.classify_by_neighbours(torch.cat(answers), is_test)
        rows = [row_of(arm, score, scores[0], groups, seed) for arm, score in zip(arms, scores, strict=True)]
        conditions: Row = {"data": images.name, "images": len(chosen)}
        if groups is not None:
            conditions["independent groups"] = len(set(groups.tolist()))
        return Table(rows, conditions | processes.conditions() | environment(*placement(base)))

    seen = []
    for batch in batches:
        with torch.inference_mode():
            seen.append((score_batch(arms, batch, saliency), batch.labels))
    return processes.joined(seen, table)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
