"""``tokenprune train digit-masks --output FOLDER`` trains the segmentation head of the shipped ViT anew.

Data, recipe and stopping rule are the constants below: the ViT stays as it is shipped, the head learns from the patch
features of canvases of training scans by cross-entropy over their cells, for a fixed number of steps, and the last
weights are kept. Nothing is chosen on test scans or on how the model behaves when tokens are removed.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.digit_masks import (
    CELL,
    CHECKPOINT,
    INKED,
    MaskHead,
    masked_digits,
    overlaps,
    patch_features,
)
from tokenprune.evals.digits import PIXEL_MEAN, PIXEL_STD, Split
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.evals.segmentation import mean_iou
from tokenprune.evals.short_training import fit, store
from tokenprune.evals.train_digits import DATA

SEED = 2
CANVASES = 6000
STEPS = 1500
BATCH = 64
PEAK_LR = 3e-3
WEIGHT_DECAY = 0.05
TEST_IMAGES = 1000
RECIPE = {
    "seed": SEED,
    "canvases": CANVASES,
    "steps": STEPS,
    "batch": BATCH,
    "optimizer": {"name": "AdamW", "weight_decay": WEIGHT_DECAY},
    "learning_rate": {"peak": PEAK_LR, "schedule": "one cycle"},
    "loss": "cross-entropy over cells, fp32; the ViT is frozen",
    "stop": "after all steps; the last weights",
}


def train(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains for ``steps`` steps and writes the weights (fp16) and their record to ``output``; returns the record.

    The global generator is seeded: the initial weights are drawn from it.
    """
    start = time.process_time()
    torch.manual_seed(SEED)
    model, head = digits_vit(), MaskHead()
    features, truth = _seen(model, "train", CANVASES)

    def loss_at(step: int) -> Tensor:
        index = torch.randint(CANVASES, (BATCH,))
        return nn.functional.cross_entropy(head(features[index]), truth[index])

    fit(head, loss_at, steps, peak_rate=PEAK_LR, weight_decay=WEIGHT_DECAY)
    store(head, output / CHECKPOINT)
    seen, wanted = _seen(model, "test", TEST_IMAGES)
    with torch.inference_mode():
        counts = overlaps(head(seen).argmax(1), wanted)
    record = {
        "architecture": "tokenprune.evals.digit_masks, on the patch features of tokenprune.evals.digits_vit",
        "recipe": {**RECIPE, "steps": steps},
        "cells": {"pixels": CELL, "inked": INKED},
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "test_images": TEST_IMAGES,
        "test_mean_iou": mean_iou(counts).item(),
        "training_cpu_seconds": round(time.process_time() - start),
        "threads": torch.get_num_threads(),
        "data": DATA,
    }
    (output / CHECKPOINT).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _seen(model: nn.Module, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """Patch features [count, 96, 10, 10] and classes of the cells [count, 20, 20] of canvases of a split."""
    features, truth = [], []
    with torch.inference_mode():
        for start in range(0, count, 100):
            images, classes = masked_digits(split, min(100, count - start), SEED, start)
            features.append(patch_features(model, images))
            truth.append(classes)
    return torch.cat(features).clone(), torch.cat(truth)
