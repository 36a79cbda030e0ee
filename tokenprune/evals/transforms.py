"""From pictures to model inputs and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokenprune.evals.data import Transform


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the usual input of a timm-like model; (3, 224, 224) where it does not say."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    # A model that was made at another size than its configuration's has it in its patch embedding.
    embed: Any = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or (height, width)
    return int(channels), int(height), int(width)


def model_transform(model: nn.Module) -> Transform:
    """timm's evaluation transform for `model`, from an RGB PIL image to [C, H, W], at the model's input size."""
    from timm.data import config
    from timm.data.transforms_factory import create_transform

    untyped: Any = config
    settings = untyped.resolve_model_data_config(model, args={"input_size": input_size(model)})
    transform: Transform = create_transform(**settings, is_training=False)
    return transform


def square_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The centre square of an RGB PIL image, resized to `size` and normalised: [3, size, size]."""
    from timm.data.transforms_factory import create_transform

    transform: Transform = create_transform(
        (3, size, size), is_training=False, crop_pct=1.0, mean=tuple(mean), std=tuple(std), interpolation="bicubic"
    )
    return transform


def normalization(transform: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the normalising step in a pipeline of transforms; 0 and 1 where it has none."""
    for step in getattr(transform, "transforms", ()):
        if hasattr(step, "mean") and hasattr(step, "std"):
            return tuple(float(value) for value in step.mean), tuple(float(value) for value in step.std)
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def denormalize(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Model inputs [B, C, H, W] back to pictures in [0, 1]."""
    shape = (1, -1, 1, 1)
    pictures = inputs.float() * inputs.new_tensor(std).float().view(shape) + inputs.new_tensor(mean).float().view(shape)
    return pictures.clamp(0, 1)
