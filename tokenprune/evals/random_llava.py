"""A LLaVA with random weights, of any size, and an answer of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def llava(
    *,
    layers: int = 12,
    width: int = 1024,
    head_width: int = 64,
    intermediate: int | None = None,
    tower_layers: int = 8,
    tower_width: int | None = None,
    image: int = 336,
) -> nn.Module:
    """A random LLaVA: a LLaMA of `layers` of `width` (intermediate: of its MLP, None for 11/4 of that) behind a CLIP
    tower of `tower_layers` of `tower_width` (None: of `width`) with heads of 64 and patches of 14 pixels."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    seen = tower_width or width
    tower = {"hidden_size": seen, "num_attention_heads": max(1, seen // 64), "intermediate_size": 4 * seen}
    text = {"hidden_size": width, "num_attention_heads": max(1, width // head_width)}
    text |= {"intermediate_size": intermediate or 11 * width // 4, "num_hidden_layers": layers, "vocab_size": 32064}
    tower |= {"num_hidden_layers": tower_layers, "image_size": image, "patch_size": 14}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower}, text_config={"model_type": "llama", **text}
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    evaluated: nn.Module = model.eval()
    return evaluated


def prompt(model: Any, text: int) -> dict[str, Tensor]:
    """One image in the middle of `text` tokens, on the model's device."""
    vision, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    words = torch.randint(3, 1000, (1, text), generator=generator)
    image = torch.full((1, (vision.image_size // vision.patch_size) ** 2), model.config.image_token_index)
    ids = torch.cat([words[:, : text // 2], image, words[:, text // 2 :]], 1)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    ids, pixels = ids.to(model.device), pixels.to(model.device, model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def generate(model: Any, inputs: Mapping[str, Tensor], tokens: int) -> Any:
    """An answer of so many tokens, and the cache behind it."""
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
