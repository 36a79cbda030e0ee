"""``tokenprune train deblur-swin --output FOLDER`` trains the shipped restoration network anew.

Data, recipe and stopping rule are the constants below: small crops of the training photographs, a fixed number of
steps, and the moving average of the weights is kept. Nothing is chosen on test photographs or on how the network
behaves when windows are left out, and none are in training.

What is drawn at a step depends on the step alone, and everything else is in the state that is saved on the way: a
training that was interrupted goes on exactly as it would have without.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.evals.deblur_swin import CHECKPOINT, IMAGE_SIZE, deblur_swin
from tokenprune.evals.local_blur import OUTLINE_CELLS, PHOTOGRAPHS, SIGMA, TEST_SHARES, Split, locally_blurred, psnr
from tokenprune.evals.resumable import Rates, Resumable, run, ship
from tokenprune.evals.train_swin import unfuse

SEED = 0
STEPS = 2000
BATCH = 8
CROP = 48
SHARES = (0.2, 0.9)
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
PEAK_LR = 3e-3
RATES = Rates(warmup=50, cooldown_share=0.5, last_share=0.01)
EMA_DECAY = 0.99
LOSS_EPS = 1e-3
SCALING_CROPS = 64
LOG_EVERY = 250
SAVE_EVERY = 25
VALIDATION_CROPS = 4
TEST_CROPS = 50
DATA = {
    "name": "Photographs of scikit-image, blurred in part by tokenprune.evals.local_blur",
    "photographs": list(PHOTOGRAPHS["train"]),
    "source": "skimage.data",
    "licence": "CC0, public domain, or no known copyright restrictions (see LICENSES.md)",
}


def error(restored: Tensor, sharp: Tensor) -> Tensor:
    """Charbonnier's: the mean of sqrt(d^2 + LOSS_EPS^2)."""
    return ((restored - sharp).square() + LOSS_EPS**2).sqrt().mean()


def trainable() -> Any:
    """The untrained network, each channel of its embedding scaled to a variance of one on training crops."""
    model: Any = deblur_swin(pretrained=False)
    embedding = model.patch_embed
    with torch.no_grad():
        tokens = embedding(locally_blurred("train", SCALING_CROPS, SEED, size=CROP, shares=SHARES).images)
        embedding.proj.weight /= tokens.std((0, 1, 2))[:, None, None, None]
    unfuse(model)
    return model.train()


class Training(Resumable):
    """The training of the network."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(SEED)
        self.steps = steps
        model = trainable()
        optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        super().__init__(model, optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)

    def advance(self) -> None:
        """One step, and at every LOG_EVERY-th a line of the log."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = RATES(self.step, self.steps, PEAK_LR)
        drawn = locally_blurred("train", BATCH, SEED, self.step * BATCH, size=CROP, shares=SHARES)
        self.descend(error(self.model(drawn.images), drawn.sharp))
        if self.step % LOG_EVERY == 0 or self.step == self.steps:
            before, after = averaged_psnr(self.average, "val", VALIDATION_CROPS)
            self.log.append(
                {"step": self.step, "loss": self.recent_loss(), "validation_input": before, "validation": after}
            )
        self.seconds += time.process_time() - start


def averaged_psnr(weights: dict[str, Tensor], split: Split, count: int) -> tuple[float, float]:
    """Mean PSNR in dB within the blurred part of `count` crops, of the input and restored with these weights."""
    with torch.random.fork_rng(devices=[]):
        model = trainable()
    model.load_state_dict(weights)
    drawn = locally_blurred(split, count, SEED, size=IMAGE_SIZE)
    with torch.inference_mode():
        restored = torch.cat([model(part) for part in torch.split(drawn.images, 4)])
    before, after = (psnr(images, drawn.sharp, drawn.mask).mean().item() for images in (drawn.images, restored))
    return before, after


def train(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains, or goes on where a training in `output` stopped; writes the averaged weights (fp16) and their record to
    `output` and returns the record."""
    training = Training(steps)
    run(training, output, steps, show_every=LOG_EVERY, save_every=SAVE_EVERY)
    stored = {name: value.half() for name, value in training.average.items()}
    before, after = averaged_psnr(stored, "test", TEST_CROPS)
    record = {
        "architecture": "timm Swin blocks at one resolution, see tokenprune.evals.deblur_swin",
        "recipe": recipe_record(steps),
        "test_crops": TEST_CROPS,
        "test_psnr_input": before,
        "test_psnr": after,
        "data": DATA,
    }
    return ship(training, output / CHECKPOINT, record)


def recipe_record(steps: int) -> dict[str, Any]:
    """The recipe as it is kept beside a checkpoint."""
    return {
        "seed": SEED,
        "batch": BATCH,
        "steps": steps,
        "crop": CROP,
        "blur": {"sigma": SIGMA, "shares": list(SHARES), "test_shares": list(TEST_SHARES), "cells": OUTLINE_CELLS},
        "optimizer": {"name": "AdamW", "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        "learning_rate": {
            "peak": PEAK_LR,
            "warmup_steps": RATES.warmup,
            "cooldown_share": RATES.cooldown_share,
            "last_share": RATES.last_share,
        },
        "embedding": {"start": "cosine transform", "scaled_on_crops": SCALING_CROPS},
        "average": {"decay": EMA_DECAY},
        "loss": "Charbonnier, fp32",
        "stop": "after all steps",
    }
