"""The segmentation of the shipped ViT, ViT and head trained on without a patch, as long as `cropr` trains them.

    python -m tokenprune.evals.tuned_masks --output tuned

What a model that was trained under a patch is compared with: the same canvases in the same batches, optimiser, peak
rate and schedule, the loss of the task alone, and the last weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn import functional as F

from tokenprune.evals.models import MASKS, load_model
from tokenprune.training.command import OWN_SAMPLES
from tokenprune.training.sampling import Order, loader
from tokenprune.training.state import MODEL

WEIGHT_DECAY = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the segmentation on without a patch."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.tuned_masks", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=OWN_SAMPLES)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4, help="the peak (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    loaded = load_model(MASKS)
    assert loaded.training is not None
    data, per_epoch = loaded.training(options.samples, 0), options.samples // options.batch_size
    order = Order(data.size, options.batch_size, per_epoch, options.epochs, seed=0, process=0, processes=1)
    groups = [{"params": list(loaded.model.parameters()), "lr": options.rate}]  # biases too, as those of the trainer
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=options.rate, weight_decay=WEIGHT_DECAY)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", options.epochs, step_on_epochs=False, updates_per_epoch=per_epoch
    )
    for step, (images, labels) in enumerate(loader(data.by_number(), order, workers=0)):
        scheduler.step_update(step)
        loss = F.cross_entropy(loaded.model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(loaded.model.state_dict(), options.output / MODEL)
    print(f"{step + 1} steps: loss {loss.item():.4f}; written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
