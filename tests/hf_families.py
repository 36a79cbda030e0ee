"""One small transformers model for each image tower and way in which it is held."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn

GRID = (6, 6)
PATCH = 4
WIDTH, HEADS, DEPTH = 48, 3, 4
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
}
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": GRID[0] * PATCH,
    "patch_size": PATCH,
}
MLP = {"intermediate_size": 96}
BEIT = {**SHAPE, **MLP, "layer_scale_init_value": 0.5}


def _pair(config: Any, text: Any, vision: Any) -> Any:
    return config(text_config=text(**TEXT).to_dict(), vision_config=vision(**SHAPE, **MLP).to_dict())


def _clip() -> Any:
    config = _pair(transformers.CLIPConfig, transformers.CLIPTextConfig, transformers.CLIPVisionConfig)
    config.projection_dim = 24
    return config


def _siglip() -> Any:
    return _pair(transformers.SiglipConfig, transformers.SiglipTextConfig, transformers.SiglipVisionConfig)


# Each: the class, its configuration, and the tower's prefix tokens.
TOWERS: dict[str, tuple[str, Any, int]] = {
    "clip": ("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**SHAPE, **MLP), 1),
    "siglip": ("SiglipVisionModel", lambda: transformers.SiglipVisionConfig(**SHAPE, **MLP), 0),
    "vit": ("ViTModel", lambda: transformers.ViTConfig(**SHAPE, **MLP), 1),
    "deit": ("DeiTModel", lambda: transformers.DeiTConfig(**SHAPE, **MLP), 2),
    "beit": ("BeitModel", lambda: transformers.BeitConfig(**BEIT, use_relative_position_bias=True), 1),
    "beit_shared": (
        "BeitModel",
        lambda: transformers.BeitConfig(
            **BEIT,
            use_shared_relative_position_bias=True,
            use_mean_pooling=False,
            use_absolute_position_embeddings=True,
        ),
        1,
    ),
    "dinov2": ("Dinov2Model", lambda: transformers.Dinov2Config(**SHAPE, mlp_ratio=2), 1),
    "dinov2_registers": (
        "Dinov2WithRegistersModel",
        lambda: transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=4),
        5,
    ),
    "dinov3": (
        "DINOv3ViTModel",
        lambda: transformers.DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=4),
        5,
    ),
    "internvl": (
        "InternVLVisionModel",
        lambda: transformers.InternVLVisionConfig(**SHAPE, **MLP, use_qk_norm=True),
        1,
    ),
    "idefics3": (
        "Idefics3VisionTransformer",
        lambda: transformers.models.idefics3.Idefics3VisionConfig(**SHAPE, **MLP),
        0,
    ),
    "smolvlm": (
        "SmolVLMVisionTransformer",
        lambda: transformers.models.smolvlm.SmolVLMVisionConfig(**SHAPE, **MLP),
        0,
    ),
}
HOLDERS: dict[str, tuple[str, Any, int]] = {
    "clip_projection": ("CLIPVisionModelWithProjection", lambda: transformers.CLIPVisionConfig(**SHAPE, **MLP), 1),
    "clip_model": ("CLIPModel", _clip, 1),
    "siglip_model": ("SiglipModel", _siglip, 0),
    "clip_classifier": ("CLIPForImageClassification", _clip, 1),
    "siglip_classifier": ("SiglipForImageClassification", _siglip, 0),
    "vit_classifier": ("ViTForImageClassification", lambda: transformers.ViTConfig(**SHAPE, **MLP), 1),
    "vit_masked": (
        "ViTForMaskedImageModeling",
        lambda: transformers.ViTConfig(**SHAPE, **MLP, encoder_stride=PATCH),
        1,
    ),
    "deit_distilled": (
        "DeiTForImageClassificationWithTeacher",
        lambda: transformers.DeiTConfig(**SHAPE, **MLP),
        2,
    ),
    "beit_classifier": ("BeitForImageClassification", lambda: transformers.BeitConfig(**BEIT), 1),
    "beit_backbone": (
        "BeitBackbone",
        lambda: transformers.BeitConfig(**BEIT, use_relative_position_bias=True, out_features=["stage1", "stage3"]),
        1,
    ),
    "dinov2_classifier": ("Dinov2ForImageClassification", lambda: transformers.Dinov2Config(**SHAPE, mlp_ratio=2), 1),
    "dinov2_backbone": (
        "Dinov2Backbone",
        lambda: transformers.Dinov2Config(**SHAPE, mlp_ratio=2, out_features=["stage2", "stage4"]),
        1,
    ),
    "dinov2_registers_backbone": (
        "Dinov2WithRegistersBackbone",
        lambda: transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=4),
        5,
    ),
    "dinov3_backbone": (
        "DINOv3ViTBackbone",
        lambda: transformers.DINOv3ViTConfig(**SHAPE, **MLP, out_features=["stage2", "stage4"]),
        1,
    ),
}
MODELS = {**TOWERS, **HOLDERS}


def build(name: str, attention: str = "sdpa") -> nn.Module:
    """The model in eval mode, 4 layers on a grid of 6 x 6 patches, the same discriminating weights on each call."""
    cls, config, _ = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = getattr(transformers, cls)._from_config(config(), attn_implementation=attention)
    randomise(model, zlib.crc32(name.encode()))
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: no LayerScale or bias near zero, attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last.startswith("lambda") or (last == "weight" and parameter.ndim == 1):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif "logit_scale" in name:
            parameter.fill_(2.0)
        elif parameter.ndim in (2, 4) and last == "weight" and "embedding." not in name:
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.normal_(0, gain * parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(0, 1.0 if parameter.ndim > 1 else 0.2, generator=generator)


def images(batch: int = 2, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
    """[B, 3, H, W], image i the same in every batch."""
    size = size or (GRID[0] * PATCH, GRID[1] * PATCH)
    return torch.stack(
        [torch.randn(3, *size, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(batch)]
    )


def call(model: nn.Module, x: Tensor, **kwargs: Any) -> Any:
    """The output without gradients; a model of texts and images is given three texts."""
    if "input_ids" in model.forward.__code__.co_varnames or type(model).__name__ in ("CLIPModel", "SiglipModel"):
        kwargs["input_ids"] = torch.arange(3 * 7).reshape(3, 7)
    with torch.no_grad():
        return model(pixel_values=x, **kwargs)


def tensors(output: Any) -> dict[str, Tensor]:
    """Every tensor of an output, by its path."""
    found: dict[str, Tensor] = {}
    for key, value in output.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, tuple):
            found.update({f"{key}.{i}": part for i, part in enumerate(value) if part is not None})
        elif hasattr(value, "items"):
            found.update({f"{key}.{inner}": part for inner, part in tensors(value).items()})
    return found
