"""`tokenprune eval --model clip:NAME`: zero-shot classes by their names, or retrieval of captions."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy import evaluate
from tokenprune.evals.clip import TEMPLATE, ZeroShot, class_features, load_clip, pixels
from tokenprune.evals.commands import budgets, check_output, finish, refuse_foreign, set_machine
from tokenprune.evals.data import open_data
from tokenprune.evals.records import read_lines
from tokenprune.evals.retrieval import CAPTION, evaluate_retrieval
from tokenprune.evals.table import Table

CLIP = "clip:"
RECORDS = (".jsonl", ".ndjson")


def run_eval(options: argparse.Namespace) -> int:
    """`tokenprune eval --model clip:NAME`"""
    check_output(options)
    refuse_foreign(options, ("classes", "template"))
    if options.data is None:
        raise TokenPruneError(
            f"{options.model} has no images of its own; name with --data a folder of class folders, a data set, or a"
            f" file of captions (.jsonl), lines such as {CAPTION}"
        )
    set_machine(options)
    clip, processor = load_clip(options.model.removeprefix(CLIP))
    clip.to(options.device, getattr(torch, options.dtype))
    if Path(options.data).suffix not in RECORDS:
        return finish(_zero_shot(options, clip, processor), options)
    if options.classes is not None or options.template is not None:
        raise TokenPruneError("--classes and --template are for images with classes, not for captions")
    table = evaluate_retrieval(
        clip,
        processor,
        options.data,
        options.method,
        budgets(options),
        batch_size=options.batch_size,
        samples=options.samples,
        seed=options.seed,
        show_progress=not options.quiet,
    )
    return finish(table, options)


def _zero_shot(options: argparse.Namespace, clip: torch.nn.Module, processor: object) -> Table:
    data = open_data(options.data, pixels(processor), split=options.split)
    if options.classes is not None:
        names = read_lines(options.classes, "class names")
        if data.classes is not None and data.classes != len(names):
            raise TokenPruneError(f"{options.classes} names {len(names)} classes, and {data.name} has {data.classes}")
    elif data.names is not None:
        names = [name.replace("_", " ") for name in data.names]
    else:
        raise TokenPruneError(f"{data.name} does not name its classes; --classes FILE does, one a line")
    features = class_features(clip, processor, names, options.template or [TEMPLATE])
    example, _ = next(data.batches(1, samples=1))
    return evaluate(
        ZeroShot(clip, (example.shape[-2], example.shape[-1]), features).eval(),
        data,
        options.method,
        budgets(options),
        transform=pixels(processor),
        batch_size=options.batch_size,
        samples=options.samples,
        workers=options.workers,
        seed=options.seed,
        show_progress=not options.quiet,
    )
