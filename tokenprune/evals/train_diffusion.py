"""``python -m tokenprune.evals.train_diffusion dit-digits --output FOLDER`` trains a small diffusion model.

Data, recipe and stopping rule are the constants below; nothing is chosen on test scans or on how a model behaves when
tokens are removed. The objective is flow matching (Lipman et al., 2023) on straight paths: x_t = (1 - t) x + t noise,
the target is noise - x, and t is logit-normal (Esser et al., 2024, equation 19). First the model learns to draw digits
on small canvases (a DiT in a window of its patch grid that lies elsewhere at every step), then to place them on whole
ones. Training stops after a fixed number of steps, and the moving average of the weights is kept.

What is drawn at a step depends on the step alone, and everything else is in the state that is saved on the way: a
training that was interrupted goes on exactly as it would have without.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.digits_denoisers import CHECKPOINTS, DIT, UNCONDITIONAL, UNET, predict, untrained
from tokenprune.evals.drawn_digits import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD, drawn_digit_pictures, to_model
from tokenprune.evals.resumable import Rates, Resumable, run, ship
from tokenprune.kept_patches import kept_patches, masked_mse

SEED = 0
BATCH = 32
SMALL_SIZE = 20
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WARMUP_STEPS = 100
COOLDOWN_SHARE = 0.25
LAST_LR_SHARE = 0.02
EMA_DECAY = 0.995
LABEL_DROPOUT = 0.1
PLACE_DROPOUT = 0.3
VALIDATE_EVERY = 100
VALIDATION_IMAGES = 256
SAVE_EVERY = 50

DATA = {
    "name": "Optical Recognition of Handwritten Digits, drawn on gradients by tokenprune.evals.drawn_digits",
    "source": "https://doi.org/10.24432/C50P49, through sklearn.datasets.load_digits",
    "authors": "E. Alpaydin, C. Kaynak",
    "licence": "CC BY 4.0",
}


@dataclass(frozen=True)
class Recipe:
    """small_steps on canvases of SMALL_SIZE pixels, then whole_steps on whole ones; peak_lr of AdamW."""

    small_steps: int
    whole_steps: int
    peak_lr: float

    @property
    def steps(self) -> int:
        return self.small_steps + self.whole_steps


RECIPES = {DIT: Recipe(4000, 900, 2e-3), UNET: Recipe(2500, 600, 2e-3)}


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak, constant, and a linear descent over the last steps."""
    return Rates(WARMUP_STEPS, COOLDOWN_SHARE, LAST_LR_SHARE)(step, recipe.steps, recipe.peak_lr)


@contextmanager
def _window(model: nn.Module, top: int, left: int, side: int) -> Iterator[None]:
    """Inside, a DiT's patch embedding [B, N, C] of a small canvas takes the positions of a window of its own grid."""
    embed: Any = model.pos_embed
    grid = embed.height
    rows = torch.arange(top, top + side)[:, None] * grid + torch.arange(left, left + side)
    whole, size = embed.pos_embed, (embed.height, embed.width)
    embed.pos_embed, embed.height, embed.width = whole[:, rows.flatten()], side, side
    try:
        yield
    finally:
        embed.pos_embed, (embed.height, embed.width) = whole, size


def loss(model: nn.Module, split: Any, step: int, count: int, size: int) -> Tensor:
    """Mean squared error of the velocity on `count` pictures of `size` pixels, of a model that drops patches over those
    that it kept; which pictures, their noise and their times depend on (split, step, count, size) alone. Labels and
    places are dropped in training only."""
    pictures, labels, middles = drawn_digit_pictures(split, count, SEED, step * count, size)
    images, targets, centres = to_model(pictures), torch.from_numpy(labels), torch.from_numpy(middles)
    generator = torch.Generator().manual_seed(SEED + step)
    noise = torch.randn(images.shape, generator=generator)
    time_ = torch.randn(count, generator=generator).sigmoid()
    dropped = torch.rand(count, generator=generator) < LABEL_DROPOUT
    placeless = bool(torch.rand((), generator=generator) < PLACE_DROPOUT) or size != IMAGE_SIZE
    shifts = torch.rand(2, generator=generator)
    if split == "train":
        targets = torch.where(dropped, UNCONDITIONAL, targets)
    share = time_.view(-1, 1, 1, 1)
    noisy = (1 - share) * images + share * noise
    if size != IMAGE_SIZE and hasattr(model, "pos_embed"):
        patch: int = model.config.patch_size  # type: ignore[assignment, union-attr]
        top, left = (shifts * ((IMAGE_SIZE - size) // patch + 1)).long().tolist()
        with _window(model, top, left, size // patch):
            velocity = predict(model, noisy, 1000 * time_, targets)
    else:
        velocity = predict(model, noisy, 1000 * time_, targets, None if placeless else centres)
    return masked_mse(velocity, noise - images, kept_patches(model))


class Training(Resumable):
    """The training of one of the models."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        torch.manual_seed(SEED)
        self.name, self.recipe = name, recipe
        model = untrained(name)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.peak_lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        super().__init__(model, optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)

    def advance(self) -> None:
        """One step, and at every VALIDATE_EVERY-th a line of the log."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        size = SMALL_SIZE if self.step < self.recipe.small_steps else IMAGE_SIZE
        error = loss(self.model, "train", self.step, BATCH, size)
        self.descend(error)
        if self.step % VALIDATE_EVERY == 0 or self.step == self.recipe.steps:
            self._validate(size)
        self.seconds += time.process_time() - start

    def averaged(self) -> nn.Module:
        """A model of its own with the averaged weights."""
        model = untrained(self.name)
        model.load_state_dict(self.average)
        return model

    def _validate(self, size: int) -> None:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            error = loss(self.averaged(), "val", 0, VALIDATION_IMAGES, size).item()
        self.log.append({"step": self.step, "canvas": size, "loss": self.recent_loss(), "validation": error})


def train(name: str, output: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Trains the model called `name`, or goes on where a training in `output` stopped; writes the averaged weights
    (fp16) and their record to `output` and returns the record."""
    recipe = recipe or RECIPES[name]
    training = Training(name, recipe)
    run(training, output, recipe.steps, show_every=VALIDATE_EVERY, save_every=SAVE_EVERY)
    record = {
        "architecture": f"tokenprune.evals.digits_denoisers, {name}",
        "recipe": recipe_record(recipe),
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "data": DATA,
    }
    return ship(training, output / CHECKPOINTS[name], record)


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is kept beside a checkpoint."""
    return {
        "seed": SEED,
        "batch": BATCH,
        "small_canvas": {"size": SMALL_SIZE, "steps": recipe.small_steps},
        "whole_canvas": {"size": IMAGE_SIZE, "steps": recipe.whole_steps},
        "optimizer": {"name": "AdamW", "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        "learning_rate": {
            "peak": recipe.peak_lr,
            "warmup_steps": WARMUP_STEPS,
            "cooldown_share": COOLDOWN_SHARE,
            "last_share": LAST_LR_SHARE,
        },
        "average": EMA_DECAY,
        "dropout": {"label": LABEL_DROPOUT, "place": PLACE_DROPOUT},
        "loss": "flow matching, logit-normal times, fp32",
        "stop": "after all steps",
    }


def main(arguments: list[str] | None = None) -> None:
    """The command; ``arguments`` replaces the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenprune.evals.train_diffusion",
        description="Train a small diffusion model by the recipe fixed in this file.",
        epilog="example: python -m tokenprune.evals.train_diffusion dit-digits --output dit-run",
    )
    parser.add_argument("model", choices=list(CHECKPOINTS))
    parser.add_argument("--output", type=Path, required=True, help="folder; a training that stopped in it goes on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    record = train(options.model, options.output)
    print(f"{record['training_cpu_seconds']} s of CPU time, written to {options.output}")


if __name__ == "__main__":
    main()
