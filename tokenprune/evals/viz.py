"""Pictures of what survives: dropped patches fade, merged patches get the outline and tint of their group."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokenprune
from tokenprune.errors import TokenPruneError

if TYPE_CHECKING:
    from PIL.Image import Image

Panel = tuple[str, Tensor]
"""A caption and a picture, uint8 [H, W, 3]."""

FADE = 0.2
TINT = 0.25
PANEL_PIXELS = 192
_MARGIN = 6
_CAPTION = 16


def kept_overlay(picture: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    """`picture` with the fate of its patches drawn in: uint8 [H, W, 3].

    picture: [3, H, W] in [0, 1], H and W whole multiples of the grid. source: [rows * columns], for each original patch
    which token now represents it, -1 for none (`PlaceRecord.source`). grid: (rows, columns).

    A dropped patch keeps a fifth of its contrast on white. Patches that share a token are tinted and outlined in one
    colour; a patch that stands for itself is shown as it is.
    """
    rows, columns = grid
    height, width = picture.shape[-2:]
    if height % rows or width % columns or source.numel() != rows * columns:
        raise ValueError(f"a picture of {height}x{width} and {source.numel()} patches do not fit a grid of {grid}")
    groups = source.reshape(rows, columns)
    labels = groups.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
    drawn = torch.where(labels < 0, 1.0 - FADE + FADE * picture, picture)
    line = max(1, height // rows // 12)
    for token, members in _merged_groups(source):
        colour = _colour(members).view(3, 1, 1)
        inside = labels == token
        drawn = torch.where(inside, (1.0 - TINT) * drawn + TINT * colour, drawn)
        drawn = torch.where(inside & _border(labels, line), colour, drawn)
    return _bytes(drawn)


def place_panels(
    model: nn.Module,
    inputs: Tensor,
    picture: Tensor,
    title: str,
    *,
    places: int | None = None,
    pixels: int = PANEL_PIXELS,
) -> list[Panel]:
    """The picture under its title, then a panel for each place of the patched `model` where tokens went.

    inputs: [1, C, H, W] as the model takes them. picture: the same image for the eye, [3, H, W] in [0, 1]. places: at
    most so many, evenly chosen with the last one among them. pixels: least height of a panel.

    Raises TokenPruneError where the patch lets every token stay, as one that acts in training mode alone does.
    """
    with tokenprune.record(model) as recording, torch.inference_mode():
        model(inputs)
    if not recording.forwards:
        raise TokenPruneError(f"{title}: every token stays in eval mode, and there is nothing to draw")
    forward = recording.forwards[-1]
    assert forward.grid is not None, "inputs are images"
    canvas = fit_to_grid(picture, forward.grid, pixels)
    panels = [(title, _bytes(canvas))]
    for index in _evenly(len(forward.places), places):
        place = forward.places[index]
        source = place.source[0].cpu()
        caption = f"{place.name}: {source.numel()} -> {len(set(source[source >= 0].tolist()))}"
        grid = place.grid or forward.grid  # stages of a model of windows have their own
        shown = canvas if grid == forward.grid else fit_to_grid(picture, grid, pixels)
        panels.append((caption, kept_overlay(shown, source, grid)))
    return panels


def fit_to_grid(picture: Tensor, grid: tuple[int, int], pixels: int = PANEL_PIXELS) -> Tensor:
    """`picture` [3, H, W] resized so that each patch of `grid` has the same whole number of pixels, at least `pixels`
    high."""
    rows, columns = grid
    height, width = picture.shape[-2:]
    down = math.ceil(max(pixels, height) / rows)
    across = max(1, round(down * rows / height * width / columns))
    resized = functional.interpolate(
        picture[None].float().cpu(), size=(rows * down, columns * across), mode="bilinear", antialias=True
    )
    return resized[0].clamp(0, 1)


def contact_sheet(rows: Sequence[Sequence[Panel]]) -> Image:
    """The panels on white, one row after the other, each under its caption."""
    from PIL import Image, ImageDraw, ImageFont

    heights = [max(panel.shape[0] for _, panel in row) + _CAPTION + _MARGIN for row in rows]
    widths = [sum(panel.shape[1] + _MARGIN for _, panel in row) for row in rows]
    sheet = Image.new("RGB", (max(widths) + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for caption, panel in row:
            draw.text((left, top), caption, fill="black", font=font)
            sheet.paste(Image.fromarray(panel.numpy()), (left, top + _CAPTION))
            left += panel.shape[1] + _MARGIN
        top += height
    return sheet


def _bytes(picture: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] to uint8 [H, W, 3]."""
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def _merged_groups(source: Tensor) -> list[tuple[int, Tensor]]:
    tokens, counts = torch.unique(source[source >= 0], return_counts=True)
    return [(int(token), (source == token).nonzero()) for token in tokens[counts > 1]]


def _colour(members: Tensor) -> Tensor:
    """A hue by the group's first patch: steps of the golden ratio keep close patches far apart in colour."""
    hue = (int(members.min()) * 0.618034) % 1.0
    return torch.tensor(colorsys.hsv_to_rgb(hue, 0.9, 1.0))


def _border(labels: Tensor, line: int) -> Tensor:
    """Pixels within `line` of another group or of the picture's edge: [H, W], bool."""
    padded = functional.pad(labels, (line, line, line, line), value=-2)
    height, width = labels.shape
    border = torch.zeros_like(labels, dtype=torch.bool)
    for top, left in ((0, line), (2 * line, line), (line, 0), (line, 2 * line)):
        border |= padded[top : top + height, left : left + width] != labels
    return border


def _evenly(count: int, wanted: int | None) -> list[int]:
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted({count - 1 - round(step * count / wanted) for step in range(wanted)})
