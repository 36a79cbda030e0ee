"""The small vision-language model: transformers' LLaVA, its words, and its questions."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.models import load_weights
from tokenprune.evals.placed_digits import COLOURS, GRID, IMAGE_SIZE, PATCH, PIXEL_MEAN, PIXEL_STD, PLACES, Scenes

LVLM = "lvlm-digits"
CHECKPOINT = "lvlm_digits.safetensors"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROW_WORDS = tuple(f"row_{row + 1}" for row in range(PLACES))
COLUMN_WORDS = tuple(f"column_{column + 1}" for column in range(PLACES))
WORDS = (
    *("<pad>", "<start>", "<end>", "<image>", "what", "where", "is", "?"),
    *(*DIGIT_WORDS, *COLOURS, *ROW_WORDS, *COLUMN_WORDS),
)
VISUAL_TOKENS = GRID * GRID
TEXT: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 3}
TOWER: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 3}


def token(word: str) -> int:
    """The id of a word."""
    return WORDS.index(word)


def lvlm(text: dict[str, Any] | None = None, tower: dict[str, Any] | None = None) -> nn.Module:
    """An untrained `LlavaForConditionalGeneration` in eval mode: a CLIP tower of 5 layers of width 96 over 8 x 8
    patches of 8 x 8 pixels, whose last but one gives the features, and a Llama of 8 layers of width 96.

    model(input_ids=[B, L], pixel_values=[B, 3, 64, 64]). `text` and `tower` replace arguments of the configurations.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH, **{**TOWER, **(tower or {})}),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            max_position_embeddings=256,
            pad_token_id=token("<pad>"),
            bos_token_id=token("<start>"),
            eos_token_id=token("<end>"),
            **{**TEXT, **(text or {})},
        ),
        image_token_index=token("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = _torus(model.config.vision_config)
    whole: nn.Module = model.eval()
    return whole


def lvlm_digits(folder: str | Path | None = None) -> nn.Module:
    """The model with the weights that the package ships, or with those that `tokenprune train lvlm-digits` wrote to
    `folder`; fp32, in eval mode.

    Raises TokenPruneError for weights that are not there, and for those of another model.
    """
    # Stored in half precision to stay small; copying into the model's parameters makes it fp32 again.
    model = lvlm()
    if folder is None:
        with resources.as_file(resources.files("tokenprune.evals") / "checkpoints" / CHECKPOINT) as path:
            load_weights(model, path)
    elif not (Path(folder) / CHECKPOINT).is_file():
        raise TokenPruneError(
            f"no {CHECKPOINT} in {folder}: tokenprune train {LVLM} --output FOLDER writes it when it is through, and"
            " goes on where it was stopped"
        )
    else:
        load_weights(model, Path(folder) / CHECKPOINT)
    return model


def _torus(config: Any) -> Tensor:
    """Where the tower's table of positions starts: random mixtures of sines and cosines that go round, [64, C]."""
    frequencies = torch.arange(1, GRID // 2 + 1)
    angle = 2 * torch.pi * torch.arange(GRID)[:, None] * frequencies / GRID
    waves = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    mixture = torch.randn(2 * waves.shape[1], config.hidden_size) / waves.shape[1] ** 0.5
    table: Tensor = 0.5 * torch.cat([rows, columns], 1) @ mixture
    return table


def to_model(scenes: Scenes) -> Tensor:
    """The pictures as the tower takes them [N, 3, 64, 64]: (p / 255 - PIXEL_MEAN) / PIXEL_STD."""
    pixels = torch.from_numpy(scenes.pictures).permute(0, 3, 1, 2).float().div(255)
    return pixels.sub(PIXEL_MEAN).div(PIXEL_STD).contiguous()


def what_is(colours: Tensor) -> Tensor:
    """ "what is red" for colours [N] in the order of COLOURS: ids [N, 3]; the answer is a digit."""
    return _question("what", token(next(iter(COLOURS))) + colours)


def what_is_there(count: int) -> Tensor:
    """ "what is ?" for any picture: ids [count, 3]; the answer is the picture's digits in ascending order."""
    return _question("what", torch.full((count,), token("?")))


def where_is(digits: Tensor) -> Tensor:
    """ "where is three" for digits [N]: ids [N, 3]; the answer is a row and a column."""
    return _question("where", token("zero") + digits)


def names(digits: Tensor) -> Tensor:
    """The answer [N, K + 1] that names digits [N, K] in ascending order, with the word for the end."""
    end = torch.full_like(digits[:, :1], token("<end>"))
    return torch.cat([token("zero") + digits.sort(1).values, end], 1)


def place_answer(rows: Tensor, columns: Tensor) -> Tensor:
    """The answer [N, 3] to `where_is`, with the word for the end."""
    return torch.stack([token("row_1") + rows, token("column_1") + columns, torch.full_like(rows, token("<end>"))], 1)


def prompts(questions: Tensor) -> Tensor:
    """Ids [N, 1 + 64 + Q] of the whole prompt: start, the image, the question [N, Q]."""
    opening = torch.tensor([token("<start>"), *[token("<image>")] * VISUAL_TOKENS])
    return torch.cat([opening.to(questions.device).expand(len(questions), -1), questions], 1)


def words(ids: Sequence[int] | Tensor) -> str:
    """Ids as text."""
    return " ".join(WORDS[int(i)] for i in ids)


def _question(first: str, about: Tensor) -> Tensor:
    return torch.stack([torch.full_like(about, token(first)), torch.full_like(about, token("is")), about], 1)
