"""Sparsity-aware adaptation of the shipped Swin: the accuracy with windows left out, before it and behind it.

    python -m tokenprune.evals.adapt_swin --output FOLDER

The shipped weights are trained on for a few steps in which `sparsevit` leaves out random shares of the windows
(`adapt=0.8`), and beside it for as many steps with all windows computed, which shows what the further training does by
itself. Both and the shipped model then read the same canvases of test scans at the same budgets. Recipe and stopping
rule are the constants below. A training that was interrupted goes on exactly as it would have without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.digits import cluttered_digits
from tokenprune.evals.digits_swin import IMAGE_SIZE, digits_swin
from tokenprune.evals.fidelity import correct
from tokenprune.evals.resumable import Rates, Resumable, run
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.train_swin import BATCH, BETAS, CLIP_NORM, WEIGHT_DECAY, unfuse

SEED = 3
STEPS = 200
ADAPT = 0.8
PEAK_LR = 5e-4
RATES = Rates(warmup=20, cooldown_share=0.5, last_share=0.02)
EMA_DECAY = 0.98
LOG_EVERY = 25
SAVE_EVERY = 25
SEEDS = (101, 102, 103)
CANVASES = 500
"""Of test scans, of each seed."""

SCHEDULE = "digits-swin-sparsevit-0.65"
FLOPS = (0.8, 0.65, 0.5)
SHIPPED, FURTHER, ADAPTED = "shipped", "further", "adapted"


class Training(Resumable):
    """Further training of the shipped Swin. adapt: the largest share of the windows left out, 0.0 for none."""

    def __init__(self, steps: int, adapt: float) -> None:
        self.steps = steps
        model: Any = digits_swin()
        unfuse(model)
        if adapt:
            tokenprune.patch(model, "sparsevit", adapt=adapt)
        optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        super().__init__(model.train(), optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)

    def advance(self) -> None:
        """One step, and at every LOG_EVERY-th a line of the log."""
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = RATES(self.step, self.steps, PEAK_LR)
        torch.manual_seed(SEED * 1_000_003 + self.step)  # for the shares
        images, labels = cluttered_digits("train", BATCH, SEED, start=self.step * BATCH, size=IMAGE_SIZE)
        self.descend(nn.functional.cross_entropy(self.model(images), labels))
        if self.step % LOG_EVERY == 0 or self.step == self.steps:
            self.log.append({"step": self.step, "loss": self.recent_loss()})
        self.seconds += time.process_time() - start


def train(output: Path, adapt: float, steps: int = STEPS) -> dict[str, Tensor]:
    """The averaged weights; a training in `output` that stopped goes on."""
    training = Training(steps, adapt)
    run(training, output, steps, show_every=LOG_EVERY, save_every=SAVE_EVERY)
    return training.average


def compare(weights: Mapping[str, Mapping[str, Tensor]], *, canvases: int) -> list[Row]:
    """A row for each of the weights at each budget: top-1 on the same canvases, with how much more it is than that of
    the shipped ones (paired)."""
    parts = [cluttered_digits("test", canvases, seed, size=IMAGE_SIZE) for seed in SEEDS]
    images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    budgets: dict[str, dict[str, Any]] = {"none": {}, SCHEDULE: {"schedule": SCHEDULE}}
    budgets |= {f"flops={flops:g}": {"method": "sparsevit", "flops": flops} for flops in FLOPS}
    model, rows = digits_swin(), list[Row]()
    for name, budget in budgets.items():
        hits: dict[str, Tensor] = {}
        for which, state in weights.items():
            model.load_state_dict(dict(state))
            with tokenprune.patched(model, **budget) if budget else nullcontext():
                hits[which] = _right(model, images, labels)
            row: Row = {"budget": name, "weights": which, **interval_cells("top1", bootstrap_mean(hits[which]))}
            if which != SHIPPED:
                row |= interval_cells("gain", bootstrap_mean(hits[which] - hits[SHIPPED]))
            rows.append(row)
    return rows


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in torch.split(images, 100)])
    return correct(logits, labels).double()


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapts the shipped Swin to left-out windows, and compares."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.adapt_swin", description=main.__doc__)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    weights = {SHIPPED: digits_swin().state_dict()}
    for name, adapt in ((ADAPTED, ADAPT), (FURTHER, 0.0)):
        weights[name] = train(Path(options.output) / name, adapt)
    rows = compare(weights, canvases=CANVASES)
    table = Table(rows, {"steps": STEPS, "canvases": len(SEEDS) * CANVASES, **environment("cpu")})
    print(table.to_markdown())
    table.save(Path(options.output) / "adapted.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
