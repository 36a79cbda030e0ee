"""What is learned, beside `top_k` and `random` at equal multiply-adds: top-1 of the shipped ViT, or mean IoU of its
segmentation.

    python -m tokenprune.evals.learned_quality digits-vit --weights tnt --weights cropr --output learned.md
    python -m tokenprune.evals.learned_quality digit-masks --weights masks-cropr --flops 0.5 --output masks.md

weights: folders of tokenprune train; where the model was trained too, its weights are there and used. Canvases are of
test scans, of three seeds; differences are of the same canvases. In the segmentation `top_k` and `random` bring all
tokens back in front of the last block, as `cropr` does. tuned: a folder of tokenprune.evals.tuned_masks, whose model is
the unpatched one and that of `top_k` and `random`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.arms import UNPATCHED
from tokenprune.evals.digit_masks import masked_digits, overlaps
from tokenprune.evals.digits import cluttered_digits
from tokenprune.evals.models import DIGITS, MASKS, load_model, load_weights
from tokenprune.evals.segmentation import mean_iou
from tokenprune.evals.stats import Interval, bootstrap
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.training.state import MODEL

SEEDS = (101, 102, 103)
BATCH = 100
OTHERS = ("top_k", "random")


@dataclass(frozen=True)
class Task:
    """name: of the score. draw: (canvases, seed) -> images and labels of test scans. seen: (predicted, labels) -> of
    each image what the score is made from. score: of these of drawn images [..., N, ...] -> [...]. own: what `top_k`
    and `random` are told besides."""

    name: str
    draw: Callable[[int, int], tuple[Tensor, Tensor]]
    seen: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    own: dict[str, Any]


def _right(predicted: Tensor, labels: Tensor) -> Tensor:
    return (predicted == labels).double()


TASKS = {
    DIGITS: Task("top1", lambda n, seed: cluttered_digits("test", n, seed), _right, lambda hits: hits.mean(-1), {}),
    MASKS: Task("miou", lambda n, seed: masked_digits("test", n, seed), overlaps, mean_iou, {"restore": "fusion"}),
}


def compare(
    task: Task,
    model: nn.Module,
    weights: Sequence[str],
    *,
    flops: float,
    samples: int,
    rule: dict[str, Any],
    seeds: Sequence[int] = SEEDS,
) -> list[Row]:
    """A row for the unpatched model, the other methods and each of `weights`: the score with a 95% interval over
    images, and how much more it is than that of the others (`over_...`), paired. rule: what `patch` is told of the
    weights besides."""
    images, labels = (torch.cat(parts) for parts in zip(*(task.draw(samples, seed) for seed in seeds), strict=True))
    found: dict[str, Tensor] = {UNPATCHED: _seen(task, model, images, labels)}
    ratios = {UNPATCHED: 1.0}
    for name in (*OTHERS, *weights):
        told = task.own if name in OTHERS else {"weights": name, **rule}
        own = model if name in OTHERS else with_weights(model, Path(name) / MODEL)
        with tokenprune.patched(own, name if name in OTHERS else None, flops=flops, **told):
            found[name] = _seen(task, own, images, labels)
            ratios[name] = tokenprune.report(own).to_dict()["flops_ratio"]
    rows: list[Row] = []
    for name, values in found.items():
        row: Row = {"method": name, "flops_ratio": ratios[name]}
        row |= interval_cells(task.name, _more(task, values, None))
        for other in (UNPATCHED, *OTHERS) if name in weights else ():
            row |= interval_cells(f"over_{other}", _more(task, values, found[other]))
        rows.append(row)
    return rows


def with_weights(model: nn.Module, file: Path) -> nn.Module:
    """A copy of the model with the weights in `file`, or the model where there is none."""
    if not file.is_file():
        return model
    own = deepcopy(model)
    load_weights(own, file)
    return own


def _more(task: Task, values: Tensor, others: Tensor | None) -> Interval:
    """The score of `values`, less that of `others` where there are some."""

    def drawn(draw: Tensor) -> Tensor:
        own = task.score(values[draw])
        return own if others is None else own - task.score(others[draw])

    return bootstrap(len(values), drawn)


def _seen(task: Task, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(1) for part in torch.split(images, BATCH)])
    return task.seen(predicted, labels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares learned parts with `top_k` and `random`."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.learned_quality", description=main.__doc__)
    parser.add_argument("model", choices=list(TASKS))
    parser.add_argument("--weights", action="append", required=True, help="repeatable")
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=1000, help="of each seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the canvases (default: %(default)s)")
    parser.add_argument("--restore", help="of the learned ones (default: their own)")
    parser.add_argument("--tuned", type=Path, metavar="FOLDER")
    parser.add_argument("--output", help=".md, .json or .csv")
    options = parser.parse_args(arguments)
    model, rule = load_model(options.model).model, {"restore": options.restore}
    if options.tuned is not None:
        load_weights(model, options.tuned / MODEL)
    rows = compare(
        TASKS[options.model],
        model,
        options.weights,
        flops=options.flops,
        samples=options.samples,
        rule=rule,
        seeds=options.seeds,
    )
    about = {"flops": options.flops, "canvases": len(options.seeds) * options.samples, "seeds": list(options.seeds)}
    table = Table(rows, {**about, **environment("cpu")})
    print(table.to_markdown())
    if options.output:
        table.save(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
