"""What the selectors of `cropr` cost: its forward beside those that drop as many tokens at the same places at random.

    python -m tokenprune.evals.selector_speed digits-vit vit_small_patch16_224 --output selectors.md

Interleaved in one process, by CPU time of one thread. `drawn_at_random` has a number drawn for every token of every
image in the place of a selector's score, and `fixed_at_random` the scores of the package's `random`, by which all
images keep the same tokens, so that they are ranked once. Weights do not matter here: those of timm's models and of the
selectors are random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.evals.models import SHIPPED, load_model, noise
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.side_by_side import side_by_side
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.method import Method, Score
from tokenprune.methods.cropr import cropr
from tokenprune.registry import register_method
from tokenprune.scores.fixed import hashed_scores
from tokenprune.training.distillation import Distillation
from tokenprune.training.session import start_of

DRAWN, FIXED = "drawn_at_random", "fixed_at_random"


def drawn_scores(record: AttentionRecord) -> Tensor:
    """A random number for each token of each image, [B, n]."""
    return torch.rand(record.origin.shape, device=record.hidden.device)


def without_selectors(name: str, score: Score) -> Method:
    """cropr with other scores."""
    return replace(cropr(), name=name, score=score, learned=None)


def compare(model: nn.Module, images: Tensor, *, flops: float = 0.6, rounds: int = 20) -> list[Row]:
    """A row for cropr as it is and without fusion: `over_drawn` and `over_fixed`, its throughput over theirs at the
    same numbers of tokens (median of per-round ratios with a 95% bootstrap interval); `control`: the latter over
    itself."""
    rows: list[Row] = []
    parts = start_of(model, "cropr", flops, 0, Distillation(), 0.0, {})
    generator = torch.Generator().manual_seed(0)
    for tensor in parts.tensors.values():
        tensor.normal_(generator=generator)
    for restore in ("fusion", "regression"):
        learned = tokenprune.patch(shared_copy(model), "cropr", weights=parts, flops=flops, restore=restore)
        places = tokenprune.report(learned).to_dict()["places"]
        shares = {place["name"]: place["tokens_out"] / place["tokens_in"] for place in places}
        asked: dict[str, Any] = {"schedule": shares, "restore": restore}
        others = {name: tokenprune.patch(shared_copy(model), name, **asked) for name in (DRAWN, FIXED)}
        calls = {name: partial(_run, way, images) for name, way in {"cropr": learned, **others}.items()}
        found = side_by_side(calls, FIXED, rounds=rounds, sample_seconds=0.2, clock=time.process_time)
        told = {f"over_{name.split('_')[0]}": found.ratio(name, "cropr") for name in others}
        cells = {key: cell for name, one in told.items() for key, cell in interval_cells(name, one).items()}
        rows.append({"restore": restore, "images": len(images), **cells, "control": found.control})
    return rows


def _run(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Times the selectors on the models that are named."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.selector_speed", description=main.__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--flops", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", help=".md, .json or .csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, score in ((DRAWN, drawn_scores), (FIXED, partial(hashed_scores, seed=0))):
        register_method(name)(partial(without_selectors, name, score))
    rows: list[Row] = []
    for name in options.models:
        loaded = load_model(name, random_weights=name not in SHIPPED)
        images = noise(loaded, options.batch_size, 0)
        found = compare(loaded.model, images, flops=options.flops, rounds=options.rounds)
        rows += [{"model": name, **row} for row in found]
    table = Table(rows, {"flops": options.flops, **environment("cpu")})
    print(table.to_markdown())
    if options.output:
        table.save(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
