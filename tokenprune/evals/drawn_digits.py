"""What the shipped diffusion models learn to draw: one handwritten digit somewhere on a smooth, dark background.

The scans are those of :mod:`tokenprune.evals.digits` with the same split. The background is a gradient, so that most
tokens hold little and the digit, about a fifth of the picture, holds what a viewer looks at.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.evals.digits import TILT, Split, enlarge, gradient, paint, scan_indices, scans

IMAGE_SIZE = 36
PIXEL_MEAN = 0.25
PIXEL_STD = 0.16
DIGIT_SIZE = (15, 20)
_PLACES = {"train": 3, "val": 4, "test": 5}


def drawn_digit_pictures(
    split: Split, count: int, seed: int = 0, start: int = 0, size: int = IMAGE_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float32]]:
    """Pictures [count, size, size, 3] in 0..255, labels [count] and the digits' centres [count, 2] (row and column, in
    pixels): ``start`` and following of an endless series.

    Picture i depends on (split, seed, i, size) alone. The digit comes from the split's own scans.
    """
    allowed, (ink, digits) = scan_indices(split), scans()
    pictures = np.empty((count, size, size, 3), np.uint8)
    labels, centres = np.empty(count, np.int64), np.empty((count, 2), np.float32)
    for i in range(count):
        rng = np.random.default_rng((_PLACES[split], seed, start + i))
        answer = allowed[rng.integers(len(allowed))]
        canvas = gradient(rng, size)
        height, width = rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1, 2)
        top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
        paint(canvas, enlarge(ink[answer], height, width, rng.uniform(-TILT, TILT)), top, left, rng)
        pictures[i], labels[i] = (canvas.clip(0, 1) * 255).round().astype(np.uint8), digits[answer]
        centres[i] = top + height / 2, left + width / 2
    return pictures, labels, centres


def to_model(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures [N, S, S, 3] in 0..255 to the models' space [N, 3, S, S]: (p / 255 - PIXEL_MEAN) / PIXEL_STD."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(PIXEL_MEAN).div(PIXEL_STD).contiguous()


def to_pixels(images: Tensor) -> Tensor:
    """The inverse of `to_model` for any [..., S, S], clamped to [0, 1]."""
    return (images * PIXEL_STD + PIXEL_MEAN).clamp(0, 1)
