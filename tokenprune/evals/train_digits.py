"""``tokenprune train digits-vit --output FOLDER`` trains the shipped small vision transformer anew.

Data, recipe and stopping rule are the constants below. First the model learns to read: digits on canvases of half the
side, seen through a window of its patch grid that lies elsewhere at every step (a quarter of the tokens, so several
times the images per second). Then it learns to find: whole canvases. Training stops after a fixed number of steps; of
the weights that were validated on the way, those that read most validation canvases correctly are kept. Nothing is
chosen on test scans or on how the model behaves when tokens are removed.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.digits import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD, cluttered_digit_pictures, normalise
from tokenprune.evals.digits_vit import CHECKPOINT, PATCH_SIZE, digits_vit

SEED = 0
STEPS = 7000
READING_SHARE = 0.6
READING_SIZE = 40
BATCH = 64
PEAK_LR = 1e-3
LAST_LR = 1e-5
WARMUP_SHARE = 0.04
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
VALIDATE_EVERY = 500
VALIDATION_IMAGES = 1000
TEST_IMAGES = 2000
RECIPE = {
    "seed": SEED,
    "steps": STEPS,
    "batch": BATCH,
    "reading": {"share_of_steps": READING_SHARE, "canvas": READING_SIZE},
    "optimizer": {"name": "AdamW", "betas": BETAS, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
    "learning_rate": {"peak": PEAK_LR, "last": LAST_LR, "warmup_share": WARMUP_SHARE, "descent": "linear"},
    "loss": "cross-entropy, bfloat16 autocast",
    "stop": f"after all steps; best of {VALIDATION_IMAGES} validation canvases, every {VALIDATE_EVERY} steps",
}

DATA = {
    "name": "Optical Recognition of Handwritten Digits, drawn on cluttered canvases by tokenprune.evals.digits",
    "source": "https://doi.org/10.24432/C50P49, through sklearn.datasets.load_digits",
    "authors": "E. Alpaydin, C. Kaynak",
    "licence": "CC BY 4.0",
}


class _Window(nn.Module):
    """Stands in for the model's patch dropout: only the class token and a square window of the grid go on."""

    def __init__(self, top: int, left: int, side: int) -> None:
        super().__init__()
        self.rows, self.cols = slice(top, top + side), slice(left, left + side)

    def forward(self, tokens: Tensor) -> Tensor:
        grid = math.isqrt(tokens.shape[1] - 1)
        index = torch.arange(1, 1 + grid * grid).view(grid, grid)[self.rows, self.cols].flatten()
        return torch.cat([tokens[:, :1], tokens[:, index]], dim=1)


def trainable() -> Any:
    """The untrained model; its attention unfused, as the fused kernel is ten times slower in bfloat16 on a CPU."""
    model: Any = digits_vit(pretrained=False)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to PEAK_LR, then linear descent to LAST_LR."""
    warmup = WARMUP_SHARE * steps
    if step < warmup:
        return PEAK_LR * (step + 1) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    return PEAK_LR + (LAST_LR - PEAK_LR) * done


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, lr: float) -> float:
    """One step of cross-entropy in bfloat16 autocast on images [B, 3, 80, 80]; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    loss = nn.functional.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 3, 80, 80] whose highest logit is the label; the model is left in eval mode."""
    model.eval()
    with torch.inference_mode():
        hits = [
            (model(x).argmax(1) == y).sum()
            for x, y in zip(torch.split(images, 100), torch.split(labels, 100), strict=True)
        ]
    return float(sum(hits)) / len(labels)


def _batch(step: int, window: _Window | None) -> tuple[Tensor, Tensor]:
    if window is None:
        pictures, labels = cluttered_digit_pictures("train", BATCH, SEED, step * BATCH)
        return normalise(pictures), torch.from_numpy(labels)
    pictures, labels = cluttered_digit_pictures("train", BATCH, SEED, step * BATCH, size=READING_SIZE)
    images = torch.zeros(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    rows, cols = (slice(s.start * PATCH_SIZE, s.stop * PATCH_SIZE) for s in (window.rows, window.cols))
    images[:, :, rows, cols] = normalise(pictures)
    return images, torch.from_numpy(labels)


def train(output: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains for ``steps`` steps and writes the best weights (fp16) and their record to ``output``; returns the record.

    The global generator is seeded: the initial weights are drawn from it.
    """
    from safetensors.torch import load_file, save_file

    start = time.perf_counter()
    torch.manual_seed(SEED)
    model = trainable()
    whole, side, shifts = model.patch_drop, READING_SIZE // PATCH_SIZE, (IMAGE_SIZE - READING_SIZE) // PATCH_SIZE + 1
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    val_pictures, val_labels = cluttered_digit_pictures("val", VALIDATION_IMAGES, SEED)
    val_images, val_targets = normalise(val_pictures), torch.from_numpy(val_labels)
    output.mkdir(parents=True, exist_ok=True)

    best, best_step, losses = -1.0, 0, []
    for step in range(steps):
        top, left = torch.randint(shifts, (2,)).tolist()
        window = _Window(top, left, side) if step < READING_SHARE * steps else None
        model.patch_drop = window or whole
        model.train()
        losses.append(train_step(model, optimizer, *_batch(step, window), learning_rate(step, steps)))
        last = step + 1 == steps
        if last or (step + 1) % VALIDATE_EVERY == 0:
            model.patch_drop = whole
            score = accuracy(model, val_images, val_targets)
            mean = sum(losses[-VALIDATE_EVERY:]) / len(losses[-VALIDATE_EVERY:])
            print(
                f"step {step + 1}/{steps}  loss {mean:.3f}  validation {score:.3f}  {time.perf_counter() - start:.0f} s"
            )
            if score > best:
                best, best_step = score, step + 1
                save_file({name: t.half() for name, t in model.state_dict().items()}, output / CHECKPOINT)

    model.load_state_dict(load_file(output / CHECKPOINT))
    test_pictures, test_labels = cluttered_digit_pictures("test", TEST_IMAGES, SEED)
    record = {
        "architecture": "timm VisionTransformer, see tokenprune.evals.digits_vit",
        "recipe": {**RECIPE, "steps": steps},
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "best_step": best_step,
        "validation_accuracy": best,
        "test_images": TEST_IMAGES,
        "test_accuracy": accuracy(model, normalise(test_pictures), torch.from_numpy(test_labels)),
        "training_seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "data": DATA,
    }
    (output / CHECKPOINT).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return record
