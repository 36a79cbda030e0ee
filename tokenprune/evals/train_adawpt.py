"""What `adawpt` learns for the shipped restoration network: which windows hold something blurred, and pay.

    python -m tokenprune.evals.train_adawpt --output FOLDER

The network stays as it is shipped. On crops of its training photographs and some more the predictors first learn what
is blurred to be seen (where the blur changed a pixel by more than VISIBLE), each window weighing what the network gains
in it, all windows computed; then the windows of each stage are drawn by Gumbel-softmax, and they learn by the error of
what is restored, that mask, and the budget. After a fixed number of steps thresholds of both stages are found at which
crops of the validation photograph cost the budget in the mean: the pair, of several shares of the first stage, with
which they are restored best. Nothing is chosen on test photographs. A training that was interrupted goes on exactly as
it would have without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.adapters.timm_swin import TimmSwin
from tokenprune.bisection import nearest_to
from tokenprune.evals.deblur_swin import IMAGE_SIZE, deblur_swin
from tokenprune.evals.local_blur import PHOTOGRAPHS, TEST_SHARES, Blurred, Split, locally_blurred, psnr
from tokenprune.evals.resumable import Rates, Resumable, run
from tokenprune.evals.train_deblur import error
from tokenprune.family import active_patches
from tokenprune.learned_parts import LearnedParts
from tokenprune.methods.adawpt import RATE, Predictor, guided
from tokenprune.registry import make_method
from tokenprune.windows.learned import untrained
from tokenprune.windows.lesson import WindowLesson
from tokenprune.windows.patch import WindowsPatch

METHOD, FLOPS = "adawpt", 0.5
SEED = 1
SPLITS: tuple[Split, ...] = ("train", "more")
VISIBLE = 1.5 / 255
GUIDED_STEPS = 1500
STEPS = 1800
BATCH = 4
CROP = 96
SHARES = (0.2, 0.7)
RESTORATION = 10.0
"""Times the mean error of a pixel."""

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
EMA_DECAY = 0.97
GUIDED_RATE = 1e-2
RATES = Rates(warmup=20, cooldown_share=0.7, last_share=0.01)
LOG_EVERY = 50
SAVE_EVERY = 25
CALIBRATION_CROPS = 24
FIRST_SHARES = (0.4, 0.5, 0.6, 0.7)
"""Of the windows, that the first stage computes in the pairs of thresholds that are tried."""

LARGEST, NEAR, ROUNDS = 16.0, 0.003, 10


class Training(Resumable):
    """The training of the predictors."""

    def __init__(self, steps: int, model: nn.Module | None = None) -> None:
        torch.manual_seed(SEED)
        self.steps = steps
        self.network = (deblur_swin() if model is None else model).requires_grad_(False)
        self.start = untrained(TimmSwin.describe(self.network), TimmSwin.name, make_method(METHOD, {}), SEED)
        tokenprune.patch(self.network, METHOD, flops=FLOPS, weights=self.start)
        self.patch = windows_patch(self.network)
        assert self.patch.learned is not None
        parts = self.patch.learned.requires_grad_(True)
        optimizer = torch.optim.AdamW(parts.parameters(), weight_decay=WEIGHT_DECAY)
        super().__init__(parts, optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)

    def dense(self, images: Tensor) -> Tensor:
        """What the network makes of images with all windows computed."""
        lesson = WindowLesson(torch.zeros_like(images[:, 0]), self.patch.share_of_cost, whole=True)
        self.patch.lesson = lesson
        try:
            with torch.no_grad():
                restored: Tensor = self.network(images)
        finally:
            self.patch.lesson = None
        return restored

    def advance(self) -> None:
        """One step, and at every LOG_EVERY-th a line of the log."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.steps)
        if self.step == GUIDED_STEPS:
            self.average = {key: value.clone() for key, value in self.model.state_dict().items()}
        torch.manual_seed(SEED * 1_000_003 + self.step)  # for the draws
        drawn = locally_blurred(SPLITS, BATCH, SEED, self.step * BATCH, size=CROP, shares=SHARES)
        guided_only = self.step < GUIDED_STEPS
        dense = None if guided_only else self.dense(drawn.images)
        self.patch.lesson = lesson = WindowLesson(visible(drawn), self.patch.share_of_cost, whole=guided_only)
        try:
            output = self.network(drawn.images)
            lesson.gains = gained(drawn, output.detach() if dense is None else dense)
            restored = error(output, drawn.sharp)
            self.descend(RESTORATION * restored + guided(lesson, FLOPS))
        finally:
            self.patch.lesson = None
        if self.step % LOG_EVERY == 0 or self.step == self.steps:
            right = torch.cat(
                [((scores > 0) == lesson.marked_windows(key)).flatten() for key, scores in lesson.confidences.items()]
            )
            line = {"step": self.step, "loss": self.recent_loss(), "error": restored.item()}
            self.log.append({**line, "cost": lesson.cost().item(), "right": right.float().mean().item()})
        self.seconds += time.process_time() - start


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step: two descents, one for each phase."""
    if step < GUIDED_STEPS:
        return RATES(step, min(GUIDED_STEPS, steps), GUIDED_RATE)
    return RATES(step - GUIDED_STEPS, steps - GUIDED_STEPS, RATE)


def visible(drawn: Blurred) -> Tensor:
    """[N, H, W] where the blur is to be seen."""
    return (drawn.images - drawn.sharp).abs().amax(1) > VISIBLE


def gained(drawn: Blurred, restored: Tensor) -> Tensor:
    """[N, H, W] how much the squared error of each pixel falls."""
    before, after = ((images - drawn.sharp).square().sum(1) for images in (drawn.images, restored))
    return before - after


def windows_patch(model: nn.Module) -> WindowsPatch:
    """The patch on a model of windows."""
    return next(one for one in active_patches(model).values() if isinstance(one, WindowsPatch))


def calibrated(training: Training) -> LearnedParts:
    """The averaged predictors with the thresholds at which crops of the validation photograph cost FLOPS in the mean
    and are restored best, of the pairs in which the first stage computes each of FIRST_SHARES."""
    model, patch = training.network, training.patch
    assert patch.learned is not None
    patch.learned.load_state_dict(training.average)
    drawn = locally_blurred("val", CALIBRATION_CROPS, SEED + 1, size=IMAGE_SIZE, shares=TEST_SHARES)
    first, second = (cast(Predictor, patch.learned[stage]) for stage in ("0", "1"))

    def met(part: Predictor, wanted: float, measured: Callable[[], float]) -> float:
        """The value of `measured`, nearest to `wanted`, at a threshold of a part, which is set."""

        def tried(threshold: float) -> tuple[float, float]:
            part.threshold.fill_(threshold)
            return measured(), threshold

        value, threshold = nearest_to(
            wanted, tried, -LARGEST, LARGEST, first=0.0, rising=False, near=NEAR, rounds=ROUNDS
        )
        part.threshold.fill_(threshold)
        return value

    pairs = []
    for share in FIRST_SHARES:
        second.threshold.fill_(LARGEST)
        met(first, share, lambda: mean_share(model, drawn.images, 0))
        second.threshold.fill_(-LARGEST)
        if (cost := mean_cost(model, drawn.images)) > FLOPS:
            cost = met(second, FLOPS, lambda: mean_cost(model, drawn.images))
        elif cost < FLOPS - NEAR:
            continue  # there is more to spend, on a larger share
        pairs.append((mean_psnr(model, drawn), first.threshold.item(), second.threshold.item()))
    if pairs:
        _, *thresholds = max(pairs)
        for part, threshold in zip((first, second), thresholds, strict=True):
            part.threshold.fill_(threshold)
    crops = drawn.images
    ratio = mean_cost(model, crops)
    tensors = {name: tensor.detach().clone() for name, tensor in patch.learned.state_dict().items()}
    found: dict[str, Any] = {
        "flops": FLOPS,
        "flops_ratio": ratio,
        "calibration_crops": CALIBRATION_CROPS,
        "data": "photographs of tokenprune.evals.local_blur: "
        + ", ".join(name for split in SPLITS for name in PHOTOGRAPHS[split]),
        "steps": training.steps,
        "guided_steps": GUIDED_STEPS,
        "batch_size": BATCH,
        "crop": CROP,
        "shares": list(SHARES),
        "restoration": RESTORATION,
        "learning_rate": [GUIDED_RATE, RATE],
        "weight_decay": WEIGHT_DECAY,
        "seed": SEED,
        "training_cpu_seconds": round(training.seconds),
    }
    tokenprune.unpatch(model)
    return replace(training.start, tensors=tensors, found=found)


def mean_cost(model: nn.Module, images: Tensor, batch: int = 8) -> float:
    """What a patched model costs in the mean over images, as a share of the unpatched one."""
    total = 0.0
    with torch.inference_mode():
        for part in torch.split(images, batch):
            model(part)
            total += len(part) * tokenprune.report(model).to_dict()["flops_ratio"]
    return total / len(images)


def mean_psnr(model: nn.Module, drawn: Blurred, batch: int = 8) -> float:
    """PSNR in dB within the blurred part behind a model, the mean over crops."""
    with torch.inference_mode():
        restored = torch.cat([model(part) for part in torch.split(drawn.images, batch)])
    return psnr(restored, drawn.sharp, drawn.mask).mean().item()


def mean_share(model: nn.Module, images: Tensor, stage: int, batch: int = 8) -> float:
    """The share of the windows of a stage that a patched model computes, the mean over images."""
    patch, total = windows_patch(model), 0.0
    blocks = [index for index, layout in enumerate(patch.layouts) if layout.stage == stage]
    with torch.inference_mode():
        for part in torch.split(images, batch):
            model(part)
            kept = sum(sum(patch.seen[index]) for index in blocks)
            total += kept / sum(patch.layouts[index].windows(patch.entered) for index in blocks)
    return total / len(images)


def train(output: Path, steps: int = STEPS, model: nn.Module | None = None) -> LearnedParts:
    """Trains, or goes on where a training in `output` stopped; writes what is learned to `output` and returns it."""
    training = Training(steps, model)
    run(training, output, steps, show_every=LOG_EVERY, save_every=SAVE_EVERY)
    parts = calibrated(training)
    parts.save(output)
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what adawpt learns for the shipped restoration network."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.train_adawpt", description=main.__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print({**train(Path(options.output)).found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
