"""The verb: a question about a very large image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import checked_count
from tokenprune.errors import BudgetError, UnsupportedModel
from tokenprune.lvlm.host import Crops, LvlmHost
from tokenprune.pyramid.focus import FirstLayers, Focus
from tokenprune.pyramid.prompt import host_of, prompt_of
from tokenprune.pyramid.regions import regions_of
from tokenprune.pyramid.walk import Settings, Step, walk


@dataclass(frozen=True)
class Answer:
    """texts: the answers, as many as `num_return_sequences` (one). sequences: [R, T] their token ids. steps: the levels
    that were looked at, coarsest first. tiles: how many tiles were encoded, the whole image in small among them.
    tokens: of the image, separators among them, that the language model was given. embeds: [1, L, C] its whole prompt.
    output: all that generation returned, where `return_dict_in_generate` asks for it."""

    texts: list[str]
    sequences: Tensor
    steps: list[Step]
    tiles: int
    tokens: int
    embeds: Tensor
    output: Any = None

    @property
    def text(self) -> str:
        """The first answer."""
        return self.texts[0]


def coarse_to_fine(
    model: nn.Module,
    image: Any,
    question: str | Tensor,
    *,
    processor: Any,
    focus: Focus | None = None,
    share: float = 0.25,
    max_tiles: int = 40,
    shrink: int | None = None,
    batch: int = 8,
    **generation: Any,
) -> Answer:
    """Answer a question about an image that is too large for the model, without ever holding all of its tiles.

    The whole image in small and the tiles of the coarsest level of its pyramid are encoded. `focus` says how much each
    of the level's tokens matters to the question; of the next level, twice as fine, those tiles are encoded in which
    the most important ones lie, and take their place. Where these would be too many, or there is no finer level, the
    language model answers with the most important tokens of the level, in their order, behind those of the small image.

    model: transformers' Llava, LlavaNext, LlavaOnevision, InternVL, Idefics3 or SmolVLM, not patched but for its image
    tower. image: a PIL image, a path, or an object with size = (width, height) and read(box, size), see
    `tokenprune.pyramid.regions.Regions`; only the last keeps the image itself out of memory. question: text, for the
    processor's chat template, or token ids [1, T] with placeholders of one image side by side, in the place of which
    its tokens stand. processor: the model's own.

    focus: (`Seen`) -> importance [n] of the level's tokens; `FirstLayers()`, training-free, by default; a distilled
    `FocusModule`, or any function. share: of a level's tokens that lead on, and are kept of the last (0.25 in the
    paper). max_tiles: of a level (40 in the paper for Vicuna, 80 for Qwen2). shrink: by how much the sides of a tile's
    grid of tokens are shrunk, by bilinear interpolation; 2 where each patch becomes a token, as in the paper, which
    averages 24 x 24 to 12 x 12, else 1. batch: tiles that are held as pixels. generation: for `model.generate`.

    Luo et al., ICCV 2025 (arXiv 2503.07588), section 3. Whether the small image is shrunk like the tiles is not said
    there; here it is. A separator stands behind each row of the tokens that were encoded, and always stays.

    Raises:
        UnsupportedModel: the model is none of these.
        BudgetError: share or max_tiles cannot be.
        TokenPruneError: the question has no place for an image, or for several.
    """
    host, crops = host_of(model)
    if not hasattr(host.outer, "generate"):
        raise UnsupportedModel(
            f"{type(host.outer).__name__} cannot generate; pass the ...ForConditionalGeneration that holds it"
        )
    settings = settings_of(crops, processor, share=share, max_tiles=max_tiles, shrink=shrink, batch=batch)
    prompt = prompt_of(host, crops, question, processor)
    found = walk(host, crops, prompt, regions_of(image), focus if focus is not None else FirstLayers(), settings)
    embeds = prompt.around(found.image)
    generated = _generate(host, embeds, generation)
    sequences, output = (generated, None) if isinstance(generated, Tensor) else (generated.sequences, generated)
    texts: list[str] = processor.batch_decode(sequences, skip_special_tokens=True)
    tiles = 1 + sum(len(step.tiles) for step in found.steps)
    return Answer(texts, sequences, found.steps, tiles, len(found.image), embeds, output)


def settings_of(
    crops: Crops, processor: Any, *, share: float, max_tiles: int, shrink: int | None, batch: int
) -> Settings:
    """The settings of a walk.

    Raises:
        BudgetError: one of them cannot be.
    """
    if not 0 < share <= 1:
        raise BudgetError(f"share={share!r} is to be in (0, 1]; for example share=0.25")
    shrink = crops.shrink if shrink is None else shrink
    for name, value, example in (("max_tiles", max_tiles, 40), ("shrink", shrink, 2), ("batch", batch, 8)):
        checked_count(name, value, smallest=1, example=example)
    images = processor.image_processor
    return Settings(share, max_tiles, shrink, batch, images.image_mean, images.image_std)


def _generate(host: LvlmHost, embeds: Tensor, generation: dict[str, Any]) -> Any:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    outer: Any = host.outer
    return outer.generate(inputs_embeds=embeds, attention_mask=mask, **generation)
