"""Photographs that come with scikit-image and scikit-learn themselves, so that nothing is downloaded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CROP_SHARE = 0.7
"""Side of a corner crop over the photograph's shorter side."""


class Photographs(NamedTuple):
    """Crops of photographs, and of which photograph each is one."""

    images: Tensor  # uint8, [n, 3, size, size]
    names: tuple[str, ...]  # n names; crops of one photograph share theirs


def photographs(size: int = 224) -> Photographs:
    """45 square crops of `size` pixels a side: of nine photographs the central square and four corners.

    The crops of one photograph overlap, so an interval over them must resample photographs, not crops: see
    `mean_by_photograph`. Two photographs are grey and become RGB. Raises ImportError where scikit-image or scikit-learn
    is missing.
    """
    crops: list[Tensor] = []
    names: list[str] = []
    for name, load in _sources().items():
        image = load()
        if image.ndim == 2:
            image = np.stack([image] * 3, axis=-1)
        squares = _squares(torch.from_numpy(image.copy()).permute(2, 0, 1))
        crops += [_resize(square, size) for square in squares]
        names += [name] * len(squares)
    return Photographs(torch.stack(crops), tuple(names))


def mean_by_photograph(values: Tensor, names: tuple[str, ...]) -> Tensor:
    """Values [n] of crops to their means [number of photographs], the independent items for a bootstrap."""
    return torch.stack([values[[each == name for each in names]].mean() for name in dict.fromkeys(names)])


def _sources() -> dict[str, Callable[[], NDArray[np.uint8]]]:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ImportError(
            f"the photographs come with scikit-image and scikit-learn: pip install 'tokenprune-torch[eval]' ({error})"
        ) from error

    untyped: Any = data
    return {
        "astronaut": data.astronaut,
        "camera": data.camera,
        "chelsea": data.chelsea,
        "china": lambda: load_sample_image("china.jpg"),
        "coffee": data.coffee,
        "coins": data.coins,
        "flower": lambda: load_sample_image("flower.jpg"),
        "motorcycle": lambda: untyped.stereo_motorcycle()[0],
        "rocket": data.rocket,
    }


def _squares(image: Tensor) -> list[Tensor]:
    """The central square of [3, H, W], then its four corners."""
    height, width = image.shape[1:]
    whole = min(height, width)
    side = round(CROP_SHARE * whole)
    places = [((height - whole) // 2, (width - whole) // 2, whole)]
    places += [(top, left, side) for top in (0, height - side) for left in (0, width - side)]
    return [image[:, top : top + length, left : left + length] for top, left, length in places]


def _resize(square: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(
        square[None].float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)
