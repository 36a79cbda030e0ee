"""``tokenprune train lvlm-digits --output FOLDER`` trains the small vision-language model.

Data, recipe and stopping rule are the constants below; nothing is chosen on test scans or on how the model behaves when
tokens are removed. As LLaVA it is trained in two stages. First the tower, whose class token is to say which digit has
which colour, and whose patches (in the layer that the language model will see) are to say what they belong to. Then,
with the tower frozen, the projector (whose first units start as the patches' head of before) and the language model on
questions, loss on the answers alone; for the first layers also on where each visual token is (a head that is thrown
away). Training stops after a fixed number of steps, and the moving average of the weights is kept.

Pictures are rolled by whole patches at every step, and the tower's outputs are rolled back: features can say what lies
beside what, but not where, so that places are read from the order of the visual tokens. That a language model could
also count; one that has read much text goes by its rotary embedding. So that this small one does, up to half of the
visual tokens are left out at random, at the positions that they have (which makes the steps cheaper too, as in FLIP).

What is drawn at a step depends on the step alone, and everything else is in the state that is saved on the way: a
training that was interrupted goes on exactly as it would have without.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals import digits_lvlm
from tokenprune.evals.digits import Split
from tokenprune.evals.digits_lvlm import CHECKPOINT, VISUAL_TOKENS
from tokenprune.evals.lvlm_losses import Batch, Heads, answer_loss, tower_loss
from tokenprune.evals.placed_digits import GRID, PIXEL_MEAN, PIXEL_STD, placed_digits
from tokenprune.evals.resumable import Rates, Resumable, run, ship

SEED = 0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WARMUP_STEPS = 100
COOLDOWN_SHARE = 0.3
LAST_LR_SHARE = 0.02
EMA_DECAY = 0.995
ALIGNED_REST = 0.1
VALIDATE_EVERY = 100
VALIDATION_SCENES = 128
SAVE_EVERY = 50

DATA = {
    "name": "Optical Recognition of Handwritten Digits, drawn on canvases by tokenprune.evals.placed_digits",
    "source": "https://doi.org/10.24432/C50P49, through sklearn.datasets.load_digits",
    "authors": "E. Alpaydin, C. Kaynak",
    "licence": "CC BY 4.0",
}


@dataclass(frozen=True)
class Recipe:
    """tower_steps of tower_batch pictures, then answer_steps of answer_batch with questions; peak_lr of AdamW.

    place_weight: of the loss on places behind layer place_layer, from answer step place_from on. left_out: the largest
    share of the visual tokens that are left out of a step. colours_until: answer step until which digits are named one
    by one, by their colour (which was not learnt), and from which all of a picture are.
    """

    tower_steps: int
    answer_steps: int
    tower_batch: int = 24
    answer_batch: int = 16
    peak_lr: float = 2e-3
    place_weight: float = 0.2
    place_layer: int = 3
    place_from: int = 400
    left_out: float = 0.5
    colours_until: int = 1450

    @property
    def steps(self) -> int:
        return self.tower_steps + self.answer_steps


RECIPE = Recipe(2400, 2600)


def learning_rate(step: int, recipe: Recipe) -> float:
    """In each stage a linear warm-up to the peak, constant, and a linear descent over the last steps."""
    first = step < recipe.tower_steps
    step, steps = (step, recipe.tower_steps) if first else (step - recipe.tower_steps, recipe.answer_steps)
    return Rates(WARMUP_STEPS, COOLDOWN_SHARE, LAST_LR_SHARE)(step, steps, recipe.peak_lr)


class Training(Resumable):
    """The training of the model, with heads that are thrown away later."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(SEED)
        self.recipe = recipe
        model: Any = digits_lvlm.lvlm()
        self.heads = Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
        optimizer = torch.optim.AdamW(
            [*model.parameters(), *self.heads.parameters()],
            lr=recipe.peak_lr,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        super().__init__(model, optimizer, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY, others={"heads": self.heads})

    def loss(self, model: Any, split: Split, start: int, count: int, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of the step's stage on scenes `start` and following, and shares of what is right."""
        batch = Batch.of(placed_digits(split, count, SEED, start))
        generator = torch.Generator().manual_seed(SEED + step)
        shift = torch.randint(GRID, (2,), generator=generator).tolist() if split == "train" else [0, 0]
        roll, kept = (int(shift[0]), int(shift[1])), None
        if step < self.recipe.tower_steps:
            return tower_loss(model, self.heads, batch, roll)
        if split == "train":
            share = 1 - self.recipe.left_out * torch.rand((), generator=generator).item()
            order = torch.rand(count, VISUAL_TOKENS, generator=generator).argsort(1)
            kept = order[:, : round(share * VISUAL_TOKENS)].sort(1).values
        by_colour = step < self.recipe.tower_steps + self.recipe.colours_until
        error, places, shares = answer_loss(model, self.heads, batch, roll, self.recipe.place_layer, kept, by_colour)
        late = step >= self.recipe.tower_steps + self.recipe.place_from
        return error + (self.recipe.place_weight * places if late else 0 * places), shares

    def advance(self) -> None:
        """One step, and at every VALIDATE_EVERY-th a line of the log."""
        begun, recipe = time.process_time(), self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, recipe)
        reading = self.step < recipe.tower_steps
        if self.step == recipe.tower_steps:
            self._align()
        count = recipe.tower_batch if reading else recipe.answer_batch
        start = count * (self.step if reading else self.step - recipe.tower_steps)
        error, _ = self.loss(self.model, "train", start, count, self.step)
        self.descend(error)
        if self.step % VALIDATE_EVERY == 0 or self.step == recipe.steps:
            self._validate()
        self.seconds += time.process_time() - begun

    def _align(self) -> None:
        """Between the stages: the projector starts with what patches have learnt to say, and little else."""
        name, said = "model.multi_modal_projector.linear_1", self.heads.patch
        state = self.model.state_dict()
        with torch.no_grad():
            for kind, learnt in (("weight", said.weight), ("bias", said.bias)):
                start = state[f"{name}.{kind}"]
                start.mul_(ALIGNED_REST)[: len(learnt)] = learnt
                self.average[f"{name}.{kind}"].copy_(start)

    def averaged(self) -> nn.Module:
        """A model of its own with the averaged weights."""
        with torch.random.fork_rng(devices=[]):
            model = digits_lvlm.lvlm()
        model.load_state_dict(self.average)
        return model

    def _validate(self) -> None:
        with torch.inference_mode():
            error, shares = self.loss(self.averaged(), "val", 0, VALIDATION_SCENES, self.step - 1)
        self.log.append({"step": self.step, "loss": self.recent_loss(), "validation": error.item(), **shares})


def train(output: Path, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """Trains the model, or goes on where a training in `output` stopped; writes the averaged weights (fp16) and their
    record to `output` and returns the record."""
    training = Training(recipe)
    run(training, output, recipe.steps, show_every=VALIDATE_EVERY, save_every=SAVE_EVERY)
    record = {
        "architecture": "tokenprune.evals.digits_lvlm",
        "recipe": recipe_record(recipe),
        "normalisation": {"mean": PIXEL_MEAN, "std": PIXEL_STD},
        "data": DATA,
    }
    return ship(training, output / CHECKPOINT, record)


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is kept beside the checkpoint."""
    return {
        "seed": SEED,
        **asdict(recipe),
        "optimizer": {"name": "AdamW", "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        "learning_rate": {
            "warmup_steps": WARMUP_STEPS,
            "cooldown_share": COOLDOWN_SHARE,
            "last_share": LAST_LR_SHARE,
        },
        "average": EMA_DECAY,
        "loss": "cross-entropy of the answers, fp32",
        "stop": "after all steps",
    }
