"""What `tokenprune search` does with its options."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.commands import first_images, image_data, load
from tokenprune.evals.ranks import is_main

FILE = "schedule.json"
SHOW_EVERY = 10


def run_search(options: argparse.Namespace) -> int:
    """`tokenprune search`"""
    model, images = unlabelled_images(options)
    folder = Path(options.output)
    found = tokenprune.search(
        model,
        images,
        options.method,
        flops=options.flops,
        speedup=options.speedup,
        min_agreement=options.min_agreement,
        strategy=options.strategy,
        candidates=options.candidates,
        batch_size=options.batch_size,
        seed=options.seed,
        restore=options.restore,
        output=folder,
        show_every=None if options.quiet else SHOW_EVERY,
    )
    if not is_main():
        return 0
    found.save(folder / FILE)
    if options.format == "json":
        print((folder / FILE).read_text(encoding="utf-8").rstrip("\n"))
        return 0
    print(f"{found.method}, schedule={dict(found.schedule)}")
    print(", ".join(f"{name} {value}" for name, value in found.found.items()))
    print(f'tokenprune.patch(model, schedule="{folder / FILE}")')
    return 0


def unlabelled_images(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model that the options name, and images [N, C, H, W] of what --data names or, of the model's own, of those
    that eval does not take."""
    loaded = load(options)
    data = image_data(options, replace(loaded, data=loaded.unlabelled), options.samples)
    images = first_images(data, options.samples, options.seed)
    return loaded.model, images.to(options.device, getattr(torch, options.dtype))
