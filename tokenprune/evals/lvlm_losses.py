"""What the small vision-language model is trained on: the losses of its two stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tokenprune.evals import digits_lvlm
from tokenprune.evals.digits import NUM_CLASSES
from tokenprune.evals.digits_lvlm import VISUAL_TOKENS, names, place_answer, what_is, what_is_there, where_is
from tokenprune.evals.placed_digits import COLOURS, DIGITS, GRID, NOTHING, PATCH, Scenes

BACKGROUND_WEIGHT = 0.3


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
