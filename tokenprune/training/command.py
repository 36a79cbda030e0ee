"""`tokenprune train MODEL --method NAME`."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.models import DIGITS, MASKS, SWIN, load_model
from tokenprune.registry import make_method
from tokenprune.training.trainer import train

OWN_SAMPLES = 6400


def run(options: argparse.Namespace) -> int:
    """Train what the method learns, and print what came of it."""
    own = _of_method(options)
    if options.flops is None and make_method(options.method, own).tuning is None:
        raise TokenPruneError(
            f"--flops is missing, the share that is to be computed: --method {options.method} --flops 0.6"
        )
    if options.steps is not None:
        raise TokenPruneError("--steps is of the recipes; a method is trained for --epochs")
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, checkpoint=options.checkpoint, random_weights=options.random_weights)
    if options.data is None and loaded.training is None:
        raise TokenPruneError(f"{options.model} has no images of its own to train on; name some with --data")
    if options.samples is not None and (options.data is not None or loaded.training is None):
        raise TokenPruneError(f"--samples is of the images that {DIGITS}, {SWIN} and {MASKS} have themselves")
    images: object = options.data
    transform = None
    if options.data is None:
        assert loaded.training is not None
        images = loaded.training(options.samples or OWN_SAMPLES, options.seed)
    elif options.model in (DIGITS, SWIN):
        transform = loaded.transform  # a digit turned over is another one
    parts = train(
        loaded.model,
        images,
        options.method,
        flops=options.flops,
        output=options.output,
        epochs=options.epochs,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        learning_rate=options.learning_rate,
        distill_logits=options.distill_logits,
        distill_tokens=options.distill_tokens,
        model_rate=options.model_rate,
        opt=options.opt,
        sched=options.sched,
        mixed_precision=options.mixed_precision,
        seed=options.seed,
        workers=options.workers,
        save_every=options.save_every,
        transform=transform,
        split=options.split,
        show_progress=not options.quiet,
        **own,
    )
    if options.format == "json":
        print(json.dumps(parts.found, indent=2))
        return 0
    names = [name for name in ("loss", "kept", "flops_ratio") if name in parts.found]
    told = ", ".join(f"{name} {parts.found[name]:.4g}" for name in names)
    print(f"{parts.found['steps']} steps: {told}; written to {options.output}")
    return 0


def _of_method(options: argparse.Namespace) -> dict[str, Any]:
    """The method's own options, `--option NAME=VALUE`."""
    found, taken = dict[str, Any](), inspect.signature(train).parameters
    for text in options.option:
        name, given, value = text.partition("=")
        if not given or name in vars(options) or name in taken:
            raise TokenPruneError(f"--option {text}: an option of the method and its value, such as noise=0.3")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        found[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return found
