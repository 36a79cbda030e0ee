"""Finding images by text and texts by image: what pruning the image tower costs a model of the CLIP kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.evals.accuracy import placement
from tokenprune.evals.arms import Arm, Budget, build_arms, runnable
from tokenprune.evals.clip import ImageTower, pixels, text_features
from tokenprune.evals.data import ImageData, Pictures
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ranks
from tokenprune.evals.records import read_records, texts
from tokenprune.evals.saliency import feature_cosine
from tokenprune.evals.stats import bootstrap_mean, bootstrap_share
from tokenprune.evals.table import Row, Table, environment, interval_cells

RANKS = (1, 5, 10)
CAPTION = '{"image": "cat.jpg", "captions": ["a cat on a chair", "a sleeping cat"]}'


def read_captions(path: str | Path) -> tuple[list[Path], list[list[str]]]:
    """Pictures and the captions of each, of JSON lines such as CAPTION.

    Raises TokenPruneError for a file, a picture or captions that are not there.
    """
    records = read_records(path, CAPTION, ("image", "captions"))
    told = [texts(record["captions"], f"captions of record {n} of {path}") for n, record in enumerate(records, 1)]
    return [record["image"] for record in records], told


def recalls(images: Tensor, captions: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """Whether what belongs together is found among the first k by cosine: of features of images [N, D] and of captions
    [T, D], and whose image each caption is [T], {"text_recall@k": [N], "image_recall@k": [T]}.

    text_recall: one of an image's captions, sought by the image; image_recall: a caption's image, sought by it.
    """
    cosines = functional.normalize(images.double(), dim=1) @ functional.normalize(captions.double(), dim=1).T
    found = {}
    for k in RANKS:
        nearest = cosines.topk(min(k, len(captions)), dim=1).indices
        found[f"text_recall@{k}"] = (owner[nearest] == torch.arange(len(images))[:, None]).any(1)
    for k in RANKS:
        nearest = cosines.T.topk(min(k, len(images)), dim=1).indices
        found[f"image_recall@{k}"] = (nearest == owner[:, None]).any(1)
    return found


def evaluate_retrieval(
    clip: nn.Module,
    processor: Any,
    captions: str | Path,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    batch_size: int = 32,
    samples: int | None = None,
    seed: int = 0,
    baselines: bool = True,
    show_progress: bool = False,
) -> Table:
    """Recall at 1, 5 and 10 both ways of the unpatched model and of every method at every budget.

    clip, processor: as `tokenprune.evals.clip.load_clip` gives. captions: a file, see `read_captions`. The rest as in
    `tokenprune.evals.evaluate`, in several processes too. Columns: those of `recalls` with 95% bootstrap intervals over
    images, the `_drop` and the `_kept` share of those at 1 against the unpatched model, paired, and the `cosine` of an
    image's features with its unpatched ones.

    Raises TokenPruneError as `read_captions` and `evaluate` do.
    """
    with ranks() as processes:
        paths, told = read_captions(captions)
        transform = pixels(processor)
        data = ImageData(Path(captions).name, Pictures(paths, transform), len(paths), None)
        chosen = data.chosen(samples, seed)
        told = [told[int(image)] for image in chosen]
        owner = torch.tensor([image for image, its in enumerate(told) for _ in its])
        written = text_features(clip, processor, [text for its in told for text in its]).cpu()
        device, dtype = placement(clip)
        example, _ = next(data.batches(2, samples=samples, seed=seed))
        tower = ImageTower(clip, (example.shape[-2], example.shape[-1]))
        arms = build_arms(tower, example.to(device, dtype), methods, budgets, baselines=baselines)
        batches = data.batches(batch_size, samples=samples, seed=seed, processes=processes)
        parts = []
        for images, _ in progress(batches, "retrieval", show=show_progress and processes.is_main):
            parts.append(_features(arms, images.to(device, dtype)))

        def table(whole: list[list[Tensor]]) -> Table:
            features = iter([torch.cat(arm) for arm in zip(*whole, strict=True)])
            found = [None if arm.model is None else next(features) for arm in arms]
            assert found[0] is not None
            rows = [_row(arm, one, found[0], written, owner, seed) for arm, one in zip(arms, found, strict=True)]
            conditions: Row = {"data": data.name, "images": len(chosen), "captions": len(owner)}
            return Table(rows, conditions | processes.conditions() | environment(device, dtype))

        return processes.joined(parts, table)


@torch.inference_mode()
def _features(arms: Sequence[Arm], images: Tensor) -> list[Tensor]:
    """[B, D] of each arm that has a model."""
    return [model(arm.prepare(images)).float().cpu() for arm, model, _ in runnable(arms, arms)]


def _row(arm: Arm, images: Tensor | None, base: Tensor, captions: Tensor, owner: Tensor, seed: int) -> Row:
    row: Row = {"method": arm.method, "budget": arm.budget, "flops_ratio": arm.flops_ratio, "tokens": arm.tokens}
    if images is None:
        return {**row, "note": arm.note}
    whole = recalls(base, captions, owner)
    for name, hits in recalls(images, captions, owner).items():
        groups = owner if name.startswith("image") else None
        row |= interval_cells(name, bootstrap_mean(hits, groups=groups, support=(0.0, 1.0), seed=seed))
        if name.endswith("@1"):
            lost = whole[name].double() - hits.double()
            drop = bootstrap_mean(lost, groups=groups, support=(-1.0, 1.0), seed=seed)
            kept = bootstrap_share(hits, whole[name], groups=groups, seed=seed)
            paired = interval_cells(f"{name}_drop", drop) | interval_cells(f"{name}_kept", kept)
            row |= dict.fromkeys(paired) if images is base else paired
    cosine = interval_cells("cosine", bootstrap_mean(feature_cosine(images, base), seed=seed))
    row |= {"cosine": 1.0} if images is base else cosine
    return {**row, "note": arm.note}
