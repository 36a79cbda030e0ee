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

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokenprune.evals import digits_lvlm
from tokenprune.evals.digits import NUM_CLASSES, Split
from tokenprune.evals.digits_lvlm import (
    CHECKPOINT,
    VISUAL_TOKENS,
    names,
    place_answer,
    what_is,
    what_is_there,
    where_is,
)
from tokenprune.evals.placed_digits import (
    COLOURS,
    DIGITS,
    GRID,
    NOTHING,
    PATCH,
    PIXEL_MEAN,
    PIXEL_STD,
    Scenes,
    placed_digits,
)
from tokenprune.evals.resumable import Resumable, run, ship

SEED = 0
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
WARMUP_STEPS = 100
COOLDOWN_SHARE = 0.3
LAST_LR_SHARE = 0.02
EMA_DECAY = 0.995
BACKGROUND_WEIGHT = 0.3
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
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (steps - step) / (COOLDOWN_SHARE * steps)
    return recipe.peak_lr * warm * min(1.0, LAST_LR_SHARE + (1 - LAST_LR_SHARE) * left)


class Heads(nn.Module):
    """What the training reads off the model besides its answers: digit and colour of a patch, the digit of each colour
    in the whole picture, row and column of a visual token."""

    def __init__(self, tower: int, text: int) -> None:
        super().__init__()
        self.patch = nn.Linear(tower, NUM_CLASSES + 1 + len(COLOURS) + 1)
        self.picture = nn.Linear(tower, len(COLOURS) * (NUM_CLASSES + 1))
        self.place = nn.Linear(text, 2 * GRID)


@dataclass(frozen=True)
class Batch:
    """images: [B, 3, 64, 64]; digits, colours, rows, columns: [B, 3]; patches: [B, 64], as in `Scenes`."""

    images: Tensor
    digits: Tensor
    colours: Tensor
    rows: Tensor
    columns: Tensor
    patches: Tensor

    @classmethod
    def of(cls, scenes: Scenes) -> Batch:
        facts = (scenes.digits, scenes.colours, scenes.rows, scenes.columns, scenes.patches.reshape(-1, GRID * GRID))
        return cls(digits_lvlm.to_model(scenes), *map(torch.from_numpy, facts))


def tower_loss(model: Any, heads: Heads, batch: Batch, roll: tuple[int, int]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the class token on the picture and of the patches on what they belong to."""
    pixels = (roll[0] * PATCH, roll[1] * PATCH)
    output = model.model.vision_tower(batch.images.roll(pixels, (2, 3)), output_hidden_states=True)
    here = heads.patch(rolled_back(output.hidden_states[-2][:, 1:], roll))
    on, place = batch.patches != NOTHING, batch.patches.clamp(min=0)
    digit = torch.where(on, batch.digits.gather(1, place), NUM_CLASSES)
    colour = torch.where(on, batch.colours.gather(1, place), len(COLOURS))
    weight = torch.ones(NUM_CLASSES + 1)
    weight[NUM_CLASSES] = BACKGROUND_WEIGHT
    error = cross_entropy(here[..., : NUM_CLASSES + 1].flatten(0, 1), digit.flatten(), weight)
    error = error + cross_entropy(here[..., NUM_CLASSES + 1 :].flatten(0, 1), colour.flatten())
    seen = heads.picture(model.model.vision_tower.post_layernorm(output.last_hidden_state[:, 0]))
    seen = seen.view(-1, len(COLOURS), NUM_CLASSES + 1)
    caption = torch.full(seen.shape[:2], NUM_CLASSES).scatter(1, batch.colours, batch.digits)
    error = error + cross_entropy(seen.flatten(0, 1), caption.flatten())
    patches = (here[..., : NUM_CLASSES + 1].argmax(-1) == digit)[on].float().mean()
    picture = (seen.argmax(-1) == caption)[caption < NUM_CLASSES].float().mean()
    return error, {"patches": patches.item(), "picture": picture.item()}


def rolled_back(features: Tensor, roll: tuple[int, int]) -> Tensor:
    """Features [B, 64, C] of a rolled picture in the places of the picture as it was."""
    grid = features.view(len(features), GRID, GRID, -1)
    return grid.roll((-roll[0], -roll[1]), (1, 2)).flatten(1, 2)


def answer_loss(
    model: Any,
    heads: Heads,
    batch: Batch,
    roll: tuple[int, int],
    place_layer: int,
    kept: Tensor | None = None,
    by_colour: bool = False,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(cross-entropy of the answers, that of the visual tokens' places behind `place_layer` layers, what is right).

    All questions of a picture share its visual tokens: each sees them and itself, at the positions that it would have
    alone. kept: [B, n] visual tokens that are there, None for all. by_colour: whether digits are asked for
    one by one, by their colour, and not all at once.
    """
    pixels = (roll[0] * PATCH, roll[1] * PATCH)
    with torch.no_grad():
        tower = model.model.vision_tower(batch.images.roll(pixels, (2, 3)), output_hidden_states=True)
    features = rolled_back(tower.hidden_states[-2][:, 1:], roll)
    count = len(features)
    if kept is None:
        kept = torch.arange(VISUAL_TOKENS).expand(count, -1)
    visual = model.model.multi_modal_projector(features.take_along_dim(kept.unsqueeze(2), 1))
    what = [(what_is_there(count), names(batch.digits))]
    if by_colour:
        what = [(what_is(batch.colours[:, i]), names(batch.digits[:, i : i + 1])) for i in range(DIGITS)]
    pieces, asks_where = [], []
    for i in range(DIGITS):
        pieces += what[i : i + 1]
        pieces.append((where_is(batch.digits[:, i]), place_answer(batch.rows[:, i], batch.columns[:, i])))
        asks_where += [*[False] * len(what[i : i + 1]), True]
    ids = torch.cat([torch.cat([question, answer[:, :-1]], 1) for question, answer in pieces], 1)
    lengths = [question.shape[1] + answer.shape[1] - 1 for question, answer in pieces]
    starts = [question.shape[1] - 1 for question, _ in pieces]
    text = model.model.language_model
    opening = text.embed_tokens(digits_lvlm.prompts(ids[:, :0])[:, :1])
    embeds = torch.cat([opening, visual, text.embed_tokens(ids)], 1)
    shared = 1 + kept.shape[1]
    owner = torch.cat([torch.full((shared,), -1), torch.repeat_interleave(torch.tensor(lengths))])
    behind = torch.cat([1 + VISUAL_TOKENS + torch.arange(length) for length in lengths])
    places = torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + kept, behind.expand(count, -1)], 1)
    allowed = ((owner == -1) | (owner == owner[:, None])).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf).expand(count, 1, -1, -1)
    output = text(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=places,
        use_cache=False,
        output_hidden_states=True,
    )
    guess = heads.place(output.hidden_states[place_layer][:, 1:shared]).view(-1, 2, GRID)
    rows, columns = kept.flatten() // GRID, kept.flatten() % GRID
    where = cross_entropy(guess[:, 0], rows) + cross_entropy(guess[:, 1], columns)
    ends = [shared + sum(lengths[:i]) + start for i, start in enumerate(starts)]
    asked = [end + step for end, (_, answer) in zip(ends, pieces, strict=True) for step in range(answer.shape[1])]
    logits = model.lm_head(output.last_hidden_state[:, asked])
    answers = torch.cat([answer for _, answer in pieces], 1)
    right = (logits.argmax(-1) == answers).split([answer.shape[1] for _, answer in pieces], 1)
    named = [part[:, :-1] for part, where_asked in zip(right, asks_where, strict=True) if not where_asked]
    found = [part[:, :-1].all(1) for part, where_asked in zip(right, asks_where, strict=True) if where_asked]
    shares = {
        "recognition": torch.cat(named, 1).float().mean().item(),
        "localisation": torch.stack(found).float().mean().item(),
    }
    return cross_entropy(logits.flatten(0, 1), answers.flatten()), where, shares


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
