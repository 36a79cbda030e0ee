"""Images of which one region after the other is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.pyramid.levels import Box, Level, Tile


@runtime_checkable
class Regions(Protocol):
    """An image that need not be in memory. size: (width, height) in pixels."""

    size: tuple[int, int]

    def read(self, box: Box, size: tuple[int, int]) -> Any:
        """The region (left, upper, right, lower), in pixels of the image, at `size` (width, height): a PIL image, or an
        array of uint8 [height, width, 3]."""


class PilRegions:
    """Regions of a PIL image, or of a file that PIL opens. PIL decodes a file as a whole, once."""

    def __init__(self, image: Any) -> None:
        from PIL import Image

        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        if image.mode[0] in "IF":
            raise TokenPruneError(
                f"PIL cuts an image of mode {image.mode} off at 255; scale it to 8 bits, or pass an object with size"
                " and read(box, size) that does"
            )
        self.image = image if image.mode == "RGB" else image.convert("RGB")
        self.size: tuple[int, int] = self.image.size

    def read(self, box: Box, size: tuple[int, int]) -> Any:
        """See `Regions`."""
        from PIL import Image

        return self.image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def regions_of(image: Any) -> Regions:
    """`image` itself where regions of it can be read, a PIL image or a path as `PilRegions`.

    Raises:
        TokenPruneError: it is none of these.
    """
    if isinstance(image, Regions):
        return image
    if isinstance(image, (str, os.PathLike)) or (hasattr(image, "resize") and hasattr(image, "convert")):
        return PilRegions(image)
    raise TokenPruneError(
        f"image is a {type(image).__name__}; pass a PIL image, a path, or an object with size = (width, height) and"
        " read(box, size), which returns a region of it resized"
    )


def read_tiles(
    regions: Regions, level: Level, tiles: Sequence[Tile], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Pixels [T, 3, side, side] of tiles, normalised, with black padding."""
    return torch.stack([_read(regions, level, tile, mean, std) for tile in tiles])


def read_whole(regions: Regions, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels [1, 3, side, side] of the whole image, squeezed into a square."""
    return read_tiles(regions, Level(0, side, 1, 1, side, side), [(0, 0)], mean, std)


def _read(regions: Regions, level: Level, tile: Tile, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    import numpy as np

    width, height = level.content(tile)
    pixels = np.asarray(regions.read(level.box(tile, regions.size), (width, height)))
    if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
        raise TokenPruneError(
            f"{type(regions).__name__}.read returned {pixels.dtype} {list(pixels.shape)}; a region of size"
            f" {(width, height)} is uint8 {[height, width, 3]}"
        )
    square = torch.zeros(level.side, level.side, 3)
    square[:height, :width] = torch.from_numpy(pixels.copy()) / 255
    return ((square - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
