"""Scores that are drawn anew in every forward, for trainings that leave tokens out."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod, UnsupportedModel

Color = Literal["white", "red", "blue", "green", "purple"]
COLORS: tuple[Color, ...] = get_args(Color)


def check_color(color: str, sigma: float) -> None:
    """Raise UnsupportedMethod for what is no noise."""
    if color not in COLORS:
        raise UnsupportedMethod(f"color={color!r} is none of {', '.join(map(repr, COLORS))}")
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0.1 <= sigma <= 16:
        raise UnsupportedMethod(f"sigma={sigma!r} is a width in patches, from 0.1 to 16; for example sigma=1.0")


def drawn(record: AttentionRecord, color: Color = "white", sigma: float = 1.0) -> Tensor:
    """Noise of each token [B, n], of every image its own, from torch's generator of the device, as dropout is.

    White noise knows no neighbours. The other colours are white noise on the grid of patches, filtered: "red" by a
    Gaussian of width `sigma` in patches, so that neighbours are alike; "blue" by what that takes away, so that they
    differ; "green" by a band between a Gaussian of `sigma` and one of twice that; "purple" by what that takes away.

    Raises:
        UnsupportedModel: the patches fill no grid, and the noise is not white.
    """
    batch, device = record.hidden.shape[0], record.origin.device
    if color == "white":
        return torch.rand(batch, record.tokens, device=device)
    if record.grid is None:
        raise UnsupportedModel(
            f"{color} noise is drawn on a grid, and the {record.tokens} patches fill none; use color='white'"
        )
    noise = colored_noise(batch, record.grid, color, sigma, device)
    return noise.flatten(1).gather(1, record.origin.expand(batch, -1))


def colored_noise(batch: int, grid: tuple[int, int], color: Color, sigma: float, device: torch.device) -> Tensor:
    """Gaussian noise [B, rows, columns] of a colour, the same everywhere: it is drawn with a margin as wide as the
    filters, and no border is made up."""
    margin = _radius(2 * sigma)
    white = torch.randn(batch, 1, grid[0] + 2 * margin, grid[1] + 2 * margin, device=device)
    own = white[:, 0, margin : margin + grid[0], margin : margin + grid[1]]
    narrow = _blurred(white, sigma, margin)
    if color == "red":
        return narrow
    if color == "blue":
        return own - narrow
    band = narrow - _blurred(white, 2 * sigma, margin)
    return band if color == "green" else own - band


def _radius(sigma: float) -> int:
    return math.ceil(3 * sigma)


def _blurred(white: Tensor, sigma: float, margin: int) -> Tensor:
    """White noise [B, 1, rows + 2 margin, columns + 2 margin] under a Gaussian, [B, rows, columns]."""
    radius = _radius(sigma)
    spare = margin - radius
    if spare:
        white = white[..., spare:-spare, spare:-spare]
    line = torch.arange(-radius, radius + 1, device=white.device)
    weights = torch.exp(-(line**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    rows = functional.conv2d(white, weights.view(1, 1, -1, 1))
    return functional.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]
