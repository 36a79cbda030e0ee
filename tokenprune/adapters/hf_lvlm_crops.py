"""Crops of an image in transformers' vision-language models: encoded one by one, whatever puts them together."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.lvlm.host import Crops

WHOLE = "its image tower takes an image whole, at any size, and its tokens have positions in rows and columns"
BOTH_WAYS = "its image tokens attend in both directions, by masks that the model makes for its own placeholders"


def llava_crops(model: Any) -> Crops:
    """Of the LLaVA family, where each patch becomes a token; of those that pack crops, rows end in a newline."""
    separator = getattr(model, "image_newline", None)
    tower = model.config.vision_config
    patches = (int(tower.image_size) // int(tower.patch_size)) ** 2
    return Crops(
        int(tower.image_size),
        partial(_as_llava, model, patches),
        separator,
        shrink=2,
        tokens=patches if separator is None else None,
    )


def internvl_crops(model: Any) -> Crops:
    """Of InternVL, which shuffles patches to fewer tokens."""
    return Crops(int(model.config.vision_config.image_size[0]), partial(_encoded, model))


def idefics_crops(model: Any) -> Crops:
    """Of Idefics3 and SmolVLM, which shuffle patches to fewer tokens."""
    return Crops(int(model.config.vision_config.image_size), partial(_as_samples, model))


def _as_llava(model: Any, patches: int, pixels: Tensor) -> Tensor:
    """Newer members of the family pack crops where they encode them; of a crop by itself they make what the first one
    makes. Of crops no class or register tokens go on."""
    from transformers.models.llava.modeling_llava import LlavaModel

    features = LlavaModel.get_image_features(model, pixels, return_dict=True).pooler_output
    return torch.stack(list(features))[:, -patches:]


def _encoded(model: Any, pixels: Tensor) -> Tensor:
    return model.get_image_features(pixels, return_dict=True).pooler_output


def _as_samples(model: Any, pixels: Tensor) -> Tensor:
    return torch.stack(list(model.get_image_features(pixels.unsqueeze(1), return_dict=True).pooler_output))
