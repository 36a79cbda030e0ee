"""What a page needs to draw which tokens survive: pictures, and for each place the token that stands for each patch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import tokenprune
from tokenprune.evals.arms import Arm, runnable
from tokenprune.evals.viz import fit_to_grid

PIXELS = 224


def overlays(arms: Sequence[Arm], inputs: Tensor) -> dict[str, Any]:
    """{"grid": (rows, columns) of the patches, "arms": one entry for each arm that reduces tokens}.

    inputs: [B, C, H, W]. An entry has the method, the budget and its places: the name, the grid where it has one of its
    own, and `source`, for each of the B images the token that leaves for each original patch, -1 for a dropped one.
    """
    found: list[dict[str, Any]] = []
    grid: tuple[int, int] | None = None
    for arm, model, _ in runnable(arms, arms):
        if not arm.is_patched:
            continue
        with tokenprune.record(model) as recording, torch.inference_mode():
            model(inputs)
        if not recording.forwards:  # at a budget of 1.0
            continue
        forward = recording.forwards[-1]
        grid = grid or forward.grid
        places = [{"name": place.name, "grid": place.grid, "source": place.source.tolist()} for place in forward.places]
        found.append({"method": arm.method, "budget": arm.budget, "places": places})
    return {"grid": grid, "arms": found}


def pictures(images: Tensor, grid: tuple[int, int]) -> list[str]:
    """Pictures [B, 3, H, W] in [0, 1] as data: addresses of PNG files whose patches have whole numbers of pixels."""
    return [_address(fit_to_grid(image, grid, PIXELS)) for image in images]


def addresses(images: Tensor) -> list[str]:
    """Pictures [B, 3, H, W] in [0, 1] as data: addresses of PNG files."""
    return [_address(image) for image in images]


def _address(picture: Tensor) -> str:
    from PIL import Image

    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
