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
    mean_iou,
    overlaps,
    patch_features,
)
from tokenprune.evals.digits import PIXEL_MEAN, PIXEL_STD, Split
from tokenprune.evals.digits_vit import digits_vit
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
    from safetensors.torch import save_file

    start = time.process_time()
    torch.manual_seed(SEED)
    model, head = digits_vit(), MaskHead()
    features, truth = _seen(model, "train", CANVASES)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=max(steps, 4))
    for step in range(steps):
        index = torch.randint(CANVASES, (BATCH,))
        loss = nn.functional.cross_entropy(head(features[index]), truth[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step + 1 == steps or (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.process_time() - start:.0f} s", flush=True)
    stored = {name: value.half() for name, value in head.state_dict().items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file(stored, output / CHECKPOINT)
    head.load_state_dict(stored)
    features, truth = _seen(model, "test", TEST_IMAGES)
    with torch.inference_mode():
        counts = overlaps(head(features).argmax(1), truth)
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
