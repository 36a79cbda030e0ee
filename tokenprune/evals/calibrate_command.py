"""What `tokenprune calibrate` does with its options."""

from __future__ import annotations

import argparse

import tokenprune
from tokenprune.evals.search_command import unlabelled_images
from tokenprune.evals.table import checked_path


def run_calibrate(options: argparse.Namespace) -> int:
    """`tokenprune calibrate`"""
    path = checked_path(options.output, (".json",))
    model, images = unlabelled_images(options)
    found = tokenprune.calibrate(
        model,
        images,
        options.method,
        flops=options.flops,
        batch_size=options.batch_size,
        restore=options.restore,
    )
    found.save(path)
    if options.format == "json":
        print(path.read_text(encoding="utf-8").rstrip("\n"))
        return 0
    print(f"{found.method}, {', '.join(f'{name}={value!r}' for name, value in found.options.items())}")
    print(f"flops_ratio {found.found['flops_ratio']:.4f} in the mean over {len(images)} images")
    print(f'tokenprune.patch(model, schedule="{path}")')
    return 0
