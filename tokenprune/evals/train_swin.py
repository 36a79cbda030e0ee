"""``tokenprune train digits-swin --output FOLDER`` trains the shipped small Swin transformer anew.

Data, recipe and stopping rule are the constants below. First the model learns to read, on canvases that are hardly
larger than a digit and then on some of half the side (windows know no place in the image), then to find: whole
canvases, the learning rate descending. Training stops after a fixed number of steps, and the moving average of the
weights over the last phase is kept. Nothing is chosen on test scans or on how the model behaves when windows are left
out, and none are in training.

What is drawn at a step depends on the step alone, and everything else is in the state that is saved on the way: a
training that was interrupted goes on exactly as it would have without.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.digits import PIXEL_MEAN, PIXEL_STD, cluttered_digits
from tokenprune.evals.digits_swin import CHECKPOINT, IMAGE_SIZE, WINDOW_SIZE, digits_swin
from tokenprune.evals.resumable import Rates, Resumable, run, ship
from tokenprune.evals.train_digits import DATA, accuracy

SEED = 0
BATCH = 64
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
PEAK_LR = 2e-3
RATES = Rates(warmup=200, cooldown_share=0.11, last_share=0.02)
EMA_DECAY = 0.995
LAST_EMA_DECAY = 0.98
LOG_EVERY = 250
SAVE_EVERY = 50
VALIDATION_IMAGES = 500
TEST_IMAGES = 2000


@dataclass(frozen=True)
class Recipe:
    """phases: (side of the canvases in pixels, steps), one after another."""

    phases: tuple[tuple[int, int], ...] = ((30, 500), (48, 650), (IMAGE_SIZE, 150))

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self.phases)

    @property
    def last_phase(self) -> int:
        """The step with which it begins."""
        return self.steps - self.phases[-1][1]

    def size(self, step: int) -> int:
        """Side of the canvases of a step."""
        ends = itertools.accumulate(steps for _, steps in self.phases)
        return next(size for (size, _), end in zip(self.phases, ends, strict=True) if step < end)


RECIPE = Recipe()


def take(model: Any, size: int) -> None:
    """Make `model` one of images of `size` pixels, in the same windows: small grids are padded to them."""
    model.set_input_size(img_size=(size, size), window_size=WINDOW_SIZE, always_partition=True)


def unfuse(model: nn.Module) -> None:
    """Plain attention in a model of timm, whose training is then faster with windows of so few tokens."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def trainable() -> Any:
    """The untrained model."""
    model: Any = digits_swin(pretrained=False)
    unfuse(model)
    return model.train()


class Training(Resumable):
    """The training of the model."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(SEED)
        self.recipe = recipe
        model = trainable()
        optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        super().__init__(model, optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)

    def advance(self) -> None:
        """One step, and at every LOG_EVERY-th a line of the log."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = RATES(self.step, self.recipe.steps, PEAK_LR)
        if self.step == self.recipe.last_phase:
            self.average = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.ema_decay = EMA_DECAY if self.step < self.recipe.last_phase else LAST_EMA_DECAY
        size = self.recipe.size(self.step)
        take(self.model, size)
        images, labels = cluttered_digits("train", BATCH, SEED, start=self.step * BATCH, size=size)
        self.descend(nn.functional.cross_entropy(self.model(images), labels))
        if self.step % LOG_EVERY == 0 or self.step == self.recipe.steps:
            right = averaged_accuracy(self.average, "val", VALIDATION_IMAGES, size)
            line = {"step": self.step, "canvas": size, "loss": self.recent_loss(), "validation": right}
            self.log.append(line)
        self.seconds += time.process_time() - start


def averaged_accuracy(weights: dict[str, Tensor], split: Any, count: int, size: int = IMAGE_SIZE) -> float:
    """Share of `count` canvases of `size` pixels that a model with these weights reads."""
    with torch.random.fork_rng(devices=[]):
        model = trainable()
    model.load_state_dict(weights)
    take(model, size)
    return accuracy(model, *cluttered_digits(split, count, SEED, size=size))


def train(output: Path, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Trains, or goes on where a training in `output` stopped; writes the averaged weights (fp16) and their record to
    `output` and returns the record."""
    training = Training(recipe)
    run(training, output, recipe.steps, show_every=LOG_EVERY, save_every=SAVE_EVERY)
    stored = {name: value.half() for name, value in training.average.items()}
    record = {
        "architecture": "timm SwinTransformer, see tokenprune.evals.digits_swin",
        "recipe": recipe_record(recipe),
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "test_images": TEST_IMAGES,
        "test_accuracy": averaged_accuracy(stored, "test", TEST_IMAGES),
        "data": DATA,
    }
    return ship(training, output / CHECKPOINT, record)


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is kept beside a checkpoint."""
    return {
        "seed": SEED,
        "batch": BATCH,
        "phases": [{"canvas": size, "steps": steps} for size, steps in recipe.phases],
        "optimizer": {"name": "AdamW", "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        "learning_rate": {
            "peak": PEAK_LR,
            "warmup_steps": RATES.warmup,
            "cooldown_share": RATES.cooldown_share,
            "last_share": RATES.last_share,
        },
        "average": {"decay": EMA_DECAY, "of_last_phase": LAST_EMA_DECAY},
        "loss": "cross-entropy, fp32",
        "stop": "after all steps",
    }
