"""The baseline that needs no method at all: the same model on a smaller picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.errors import UnsupportedModel
from tokenprune.evals.flops import multiply_adds
from tokenprune.evals.shared_copy import shared_copy

FILTERS = ("bicubic", "bilinear", "area")


@dataclass(frozen=True)
class SmallerInput:
    """A model for inputs of `size` (height, width) in pixels, and its multiply-adds over those at full size."""

    model: nn.Module
    size: tuple[int, int]
    flops: int
    flops_ratio: float


def smaller_input(model: nn.Module, images: Tensor, flops_ratio: float) -> SmallerInput:
    """The input size of the same shape whose multiply-adds come nearest to `flops_ratio` of those of `images`.

    `images` is [B, C, H, W]. Sizes are whole numbers of patches. Models of a fixed size are adapted by timm's own
    `set_input_size` (position embeddings are resampled) on a copy that shares every other weight.

    Raises UnsupportedModel, saying why, where the model has no patch grid or takes one size only.
    """
    patch = _patch_size(model)
    height, width = images.shape[-2:]
    rows, columns = height // patch[0], width // patch[1]
    full = multiply_adds(model, images)

    @cache
    def at(row: int) -> SmallerInput:
        size = (row * patch[0], max(1, round(row * columns / rows)) * patch[1])
        smaller = _resized(model, size)
        try:
            flops = multiply_adds(smaller, resize(images[:1], size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UnsupportedModel(
                f"{type(model).__name__} takes inputs of one size only ({height}x{width}), not {size[0]}x{size[1]}"
            ) from error
        return SmallerInput(smaller, size, flops, flops / full)

    if rows < 2:
        raise UnsupportedModel(f"an input of {height}x{width} is a single row of patches: there is no smaller one")
    return _nearest(at, rows - 1, flops_ratio)


def resize(images: Tensor, size: tuple[int, int], by: str = "bicubic") -> Tensor:
    """`images` [B, C, H, W] at `size` (height, width), by one of FILTERS, the first two with antialiasing; unchanged
    where they have it."""
    if tuple(images.shape[-2:]) == size:
        return images
    # CPU kernels for antialiasing exist in float32 only; the model gets its own dtype back.
    return functional.interpolate(images.float(), size=size, mode=by, antialias=by != "area").to(images.dtype)


def _nearest(at: Callable[[int], SmallerInput], largest: int, flops_ratio: float) -> SmallerInput:
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if at(middle).flops_ratio < flops_ratio:
            low = middle + 1
        else:
            high = middle
    candidates = [at(row) for row in {max(1, low - 1), low}]
    return min(candidates, key=lambda candidate: abs(candidate.flops_ratio - flops_ratio))


def _resized(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    copy = shared_copy(model)
    set_input_size = getattr(copy, "set_input_size", None)
    if set_input_size is not None:
        with torch.no_grad():
            set_input_size(img_size=size)
    return copy


def _patch_size(model: nn.Module) -> tuple[int, int]:
    embed = getattr(model, "patch_embed", None)
    if embed is not None and hasattr(embed, "feat_ratio"):
        down, across = embed.feat_ratio(as_scalar=False)
        return int(down), int(across)
    patch = getattr(getattr(model, "embeds", None), "patch_size", None)
    if patch is None:
        raise UnsupportedModel(f"{type(model).__name__} has no patch grid that the smaller-input baseline recognises")
    return int(patch[0]), int(patch[1])
