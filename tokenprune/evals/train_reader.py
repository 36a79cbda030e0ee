"""``tokenprune train digit-reader --output FOLDER`` trains the classifier of drawn digits anew.

Data, recipe and stopping rule are the constants below: cross-entropy on pictures of the training scans with pixel noise
of a random strength, a fixed number of steps, and the last weights are kept. The reader sees no generated picture.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.digit_reader import CHECKPOINT, DigitReader, read
from tokenprune.evals.drawn_digits import PIXEL_MEAN, PIXEL_STD, drawn_digit_pictures, to_model
from tokenprune.evals.short_training import fit, store
from tokenprune.evals.train_diffusion import DATA

SEED = 1
STEPS = 1500
BATCH = 64
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
NOISE = 0.3
TEST_IMAGES = 2000
RECIPE = {
    "seed": SEED,
    "steps": STEPS,
    "batch": BATCH,
    "optimizer": {"name": "AdamW", "weight_decay": WEIGHT_DECAY},
    "learning_rate": {"peak": PEAK_LR, "schedule": "one cycle"},
    "noise": {"greatest_std": NOISE},
    "loss": "cross-entropy, fp32",
    "stop": "after all steps; the last weights",
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a step; they depend on the step alone."""
    pictures, labels, _ = drawn_digit_pictures("train", BATCH, SEED, step * BATCH)
    images, generator = to_model(pictures), torch.Generator().manual_seed(SEED + step)
    strength = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
    return images + strength * torch.randn(images.shape, generator=generator), torch.from_numpy(labels)


def train(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains for ``steps`` steps and writes the weights (fp16) and their record to ``output``; returns the record.

    The global generator is seeded: the initial weights are drawn from it.
    """
    start = time.process_time()
    torch.manual_seed(SEED)
    reader = DigitReader().train()

    def loss_at(step: int) -> Tensor:
        images, labels = batch(step)
        return nn.functional.cross_entropy(reader(images), labels)

    fit(reader, loss_at, steps, peak_rate=PEAK_LR, weight_decay=WEIGHT_DECAY)
    store(reader, output / CHECKPOINT)
    pictures, labels_, _ = drawn_digit_pictures("test", TEST_IMAGES, SEED)
    _, digits = read(reader.eval(), to_model(pictures))
    record = {
        "architecture": "tokenprune.evals.digit_reader",
        "recipe": {**RECIPE, "steps": steps},
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "test_images": TEST_IMAGES,
        "test_accuracy": (digits == torch.from_numpy(labels_)).float().mean().item(),
        "training_cpu_seconds": round(time.process_time() - start),
        "threads": torch.get_num_threads(),
        "data": DATA,
    }
    (output / CHECKPOINT).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return record
