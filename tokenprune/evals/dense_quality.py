"""What each way of restoring the full grid leaves of a dense task, for every method of image towers.

    python -m tokenprune.evals.dense_quality --task masks --output FOLDER
    python -m tokenprune.evals.dense_quality --task saliency --flops 0.6 --method tome --output FOLDER

`masks`: mean IoU of the segmentation head of the shipped ViT, on cluttered digits of test scans. `saliency`:
correlation of the DINOv2's saliency map with the unpatched model's, on photographs. The model is read without pooling,
so that its forward ends on the full grid, and a budget counts what restoring it costs. Rows that the folder has are
kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.evals.arms import UNPATCHED, comparable
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import Interval, bootstrap, bootstrap_mean
from tokenprune.evals.table import Cell, Row, Table, environment, interval_cells
from tokenprune.method import Restore

FLOPS = (0.8, 0.6, 0.5, 0.4)
BATCH = 50
SEED = 3
"""Of the test canvases; those of training and of the test in its record are others."""


@dataclass(frozen=True)
class Task:
    """A dense task. model: a timm model without pooling. images: [N, 3, H, W]. read: (model, images [B, 3, H, W]) -> a
    value [B, ...] of each image. score: values [N, ...] -> what the table shows. calibration: unlabelled images."""

    name: str
    model: nn.Module
    images: Tensor
    read: Callable[[nn.Module, Tensor], Tensor]
    score: Callable[[Tensor], Interval]
    calibration: Tensor


def masks_task(samples: int) -> Task:
    """Segmentation of cluttered digits, scored by the mean IoU over all images."""
    from tokenprune.evals.digit_masks import mask_head, masked_digits, overlaps, patch_features
    from tokenprune.evals.digits_vit import digits_vit
    from tokenprune.evals.segmentation import mean_iou

    head = mask_head()
    images, truth = masked_digits("test", samples, SEED)

    def read(model: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = head(patch_features(model, images))
        return logits.argmax(1)

    def score(predicted: Tensor) -> Interval:
        counts = overlaps(predicted, truth)
        return bootstrap(len(counts), lambda draw: mean_iou(counts[draw]))

    return Task("miou", _unpooled(digits_vit()), images, read, score, masked_digits("val", 64, SEED)[0])


def saliency_task(samples: int) -> Task:
    """Saliency maps of photographs, scored by their correlation with the unpatched model's, an image at a time."""
    from tokenprune.evals.models import DINOV2, load_model
    from tokenprune.evals.saliency import saliency_correlation

    loaded = load_model(DINOV2)
    assert loaded.data is not None
    assert loaded.saliency is not None
    data, model = loaded.data(samples, 0), _unpooled(loaded.model)
    samples = min(samples, data.size)
    images, _ = next(data.batches(samples, samples=samples, seed=0))
    groups = None if data.groups is None else data.groups[data.chosen(samples, 0)]
    reference = _read(model, images, loaded.saliency)

    def score(maps: Tensor) -> Interval:
        return bootstrap_mean(saliency_correlation(maps, reference), groups=groups)

    return Task("saliency", model, images, loaded.saliency, score, images)


TASKS = {"masks": (masks_task, 500), "saliency": (saliency_task, 45)}


def _unpooled(model: Any) -> nn.Module:
    model.reset_classifier(0, "")
    unpooled: nn.Module = model.eval()
    return unpooled


def _read(model: nn.Module, images: Tensor, read: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([read(model, part) for part in torch.split(images, BATCH)])


class Rows:
    """The rows of a task, made one at a time."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def unpatched(self) -> Row:
        """The model as it is."""
        return {"method": UNPATCHED, "restore": "", "flops": 1.0, **self._scored(self.task.model)}

    def row(self, method: str, restore: str, flops: float) -> Row | None:
        """One method at one budget, restored in one way; None where that is not for this method."""
        told: Row = {"method": method, "restore": restore, "flops": flops}
        model = shared_copy(self.task.model)
        try:
            self._patch(model, method, restore, flops)
        except UnsupportedMethod:
            return None
        except BudgetError as error:
            return {**told, "note": str(error)}
        scored = self._scored(model)
        return {**told, "flops_ratio": tokenprune.report(model).to_dict()["flops_ratio"], **scored}

    def _patch(self, model: nn.Module, method: str, restore: str, flops: float) -> None:
        adaptive = ("saint", "algm", "adaptive_tome")
        if method in adaptive:
            found = tokenprune.calibrate(self.task.model, self.task.calibration, method, flops=flops, restore=restore)
            tokenprune.patch(model, schedule=found)
        else:
            tokenprune.patch(model, method, flops=flops, restore=restore)

    def _scored(self, model: nn.Module) -> Row:
        found = self.task.score(_read(model, self.task.images, self.task.read))
        return interval_cells(self.task.name, found)


def by_method(table: Table, name: str) -> Table:
    """The scores called `name` of each method at each budget, a column for each restoration."""
    found: dict[tuple[Cell, Cell], Row] = {}
    for row in table.rows[1:]:
        told = found.setdefault((row["flops"], row["method"]), {"flops": row["flops"], "method": row["method"]})
        if name in row:
            told.update({str(row["restore"]) + end: row[name + end] for end in ("", "_low", "_high")})
    return Table(list(found.values()), {f"unpatched {name}": table.rows[0][name], **table.environment})


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores a task and writes dense-TASK.md and .json into the folder, a row at a time."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.dense_quality", description=main.__doc__)
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--method", action="append", help="repeatable (default: every one that fits)")
    parser.add_argument("--restore", action="append", choices=get_args(Restore), help="repeatable (default: all)")
    parser.add_argument("--flops", action="append", type=float, help="repeatable (default: 0.8, 0.6, 0.5 and 0.4)")
    parser.add_argument("--samples", type=int, help="images (default: 500 of masks, 45 of saliency)")
    options = parser.parse_args(arguments)
    make, samples = TASKS[options.task]
    task = make(options.samples or samples)
    names = options.method or comparable(task.model)
    conditions: Row = {"task": options.task, "images": len(task.images)}
    table = Table([], conditions | environment("cpu"))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"dense-{options.task}.json"
    if path.is_file():
        table.rows = [*Table.from_json(path.read_text()).rows]
    rows, done = Rows(task), {(row["method"], row["restore"], row["flops"]) for row in table.rows}
    cases = product(options.flops or FLOPS, names, options.restore or get_args(Restore))
    if not done:
        table.rows.append(rows.unpatched())
    for flops, method, restore in cases:
        row = None if (method, restore, flops) in done else rows.row(method, restore, flops)
        if row is not None:
            table.rows.append(row)
            print(" ".join(str(cell) for cell in row.values()), flush=True)
            table.save(path)
            by_method(table, task.name).save(path.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
