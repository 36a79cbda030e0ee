"""Real handwritten digits to be found and read on cluttered canvases.

The scans are those of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
CC BY 4.0), which scikit-learn carries: 1797 pictures of 8 x 8 pixels. One of them, enlarged, is the answer; the canvas
around it shows a smooth background, lines, and strips cut from other scans that are too narrow to be read.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenprune.errors import TokenPruneError

Split = Literal["train", "val", "test"]
Floats = NDArray[np.float32]

IMAGE_SIZE = 80
NUM_CLASSES = 10
PIXEL_MEAN = 0.24
PIXEL_STD = 0.16

# Sizes in pixels (a strip's width in pixels of its scan), TILT in radians; pairs are the least and the most.
DIGIT_SIZE = (20, 26)
TILT = 0.15
STRIP_WIDTH = 3
STRIPS = (2, 4)
LINES = (0, 2)
_SPLIT_ENDS = {"train": (0, 1097), "val": (1097, 1297), "test": (1297, 1797)}


@lru_cache(maxsize=1)
def scans() -> tuple[Floats, NDArray[np.int64]]:
    """The scans [1797, 8, 8], ink in [0, 1], and the digits [1797] that they show."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=3)
def scan_indices(split: Split) -> NDArray[np.int64]:
    """The rows of scikit-learn's ``load_digits`` that belong to a split: 1097, 200 and 500, without overlap."""
    if split not in _SPLIT_ENDS:
        raise TokenPruneError(f"split must be one of {', '.join(_SPLIT_ENDS)}, got {split!r}")
    start, end = _SPLIT_ENDS[split]
    return np.random.default_rng(1797).permutation(1797)[start:end]


def enlarge(ink: Floats, height: int, width: int, angle: float) -> Floats:
    """[h, w] to [height, width], turned by ``angle`` radians about the centre, bilinear, no ink outside."""
    rows = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
    cols = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    h, w = ink.shape
    # One ring of empty pixels around the ink stands for everything outside it.
    y = np.clip((cos * rows - sin * cols + 0.5) * h + 0.5, 0, h + 0.999)
    x = np.clip((sin * rows + cos * cols + 0.5) * w + 0.5, 0, w + 0.999)
    top, left = y.astype(np.int64), x.astype(np.int64)
    y -= top
    x -= left
    padded = np.zeros((h + 2, w + 2), np.float32)
    padded[1:-1, 1:-1] = ink
    upper = padded[top, left] * (1 - x) + padded[top, left + 1] * x
    lower = padded[top + 1, left] * (1 - x) + padded[top + 1, left + 1] * x
    enlarged: Floats = upper * (1 - y) + lower * y
    return enlarged


def paint(canvas: Floats, ink: Floats, top: int, left: int, rng: np.random.Generator) -> None:
    """Covers canvas [H, W, 3] with a light colour where there is ink [h, w], from row ``top`` and column ``left``."""
    cover(canvas, ink, top, left, rng.uniform(0.7, 1.0, 3).astype(np.float32))


def cover(canvas: Floats, ink: Floats, top: int, left: int, colour: Floats) -> None:
    """As `paint`, with a `colour` [3]."""
    area = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
    area += ink[:, :, None] * (colour - area)


def gradient(rng: np.random.Generator, size: int) -> Floats:
    """A gradient [size, size, 3] between two dark colours in any direction."""
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.float32(np.sin(angle)) * axis[:, None] + np.float32(np.cos(angle)) * axis[None, :] + 0.5
    first, second = rng.uniform(0.0, 0.4, (2, 3)).astype(np.float32)
    blend: Floats = first + ramp[:, :, None] * (second - first)
    return blend


def _background(rng: np.random.Generator, size: int) -> Floats:
    """A gradient with faint grain."""
    smooth = gradient(rng, size)
    background: Floats = smooth + (rng.standard_normal((size, size), np.float32) * np.float32(0.02))[:, :, None]
    return background


def _line(rng: np.random.Generator, size: int) -> Floats:
    """One straight stroke, about two pixels wide, across the whole canvas."""
    y, x = rng.uniform(0, size, 2)
    angle = rng.uniform(0, np.pi)
    axis = np.arange(size, dtype=np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    distance = np.abs(cos * (axis[:, None] - np.float32(y)) + sin * (axis[None, :] - np.float32(x)))
    ink: Floats = np.clip(1.5 - distance, 0, 1)
    return ink


def _canvas(rng: np.random.Generator, allowed: NDArray[np.int64], size: int) -> tuple[NDArray[np.uint8], int, Floats]:
    """A picture [size, size, 3], the digit to be read on it, and where that has its ink, [size, size] in [0, 1]."""
    ink, labels = scans()
    answer, *others = allowed[rng.integers(len(allowed), size=1 + STRIPS[1])]
    canvas = _background(rng, size)
    for _ in range(rng.integers(LINES[0], LINES[1] + 1)):
        paint(canvas, _line(rng, size), 0, 0, rng)

    height, width = rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1, 2)
    top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    for other in others[: rng.integers(STRIPS[0], STRIPS[1] + 1)]:
        start = rng.integers(0, 8 - STRIP_WIDTH + 1)
        strip = ink[other][start : start + STRIP_WIDTH]
        long, short = height, round(height * STRIP_WIDTH / 8)
        piece = enlarge(strip, short, long, rng.uniform(-TILT, TILT))
        if rng.random() < 0.5:
            piece = piece.T
        y, x = rng.integers(0, size - piece.shape[0] + 1), rng.integers(0, size - piece.shape[1] + 1)
        beside = y >= top + height or y + piece.shape[0] <= top or x >= left + width or x + piece.shape[1] <= left
        if beside:
            paint(canvas, piece, y, x, rng)
    strokes, inked = enlarge(ink[answer], height, width, rng.uniform(-TILT, TILT)), np.zeros((size, size), np.float32)
    inked[top : top + height, left : left + width] = strokes
    paint(canvas, strokes, top, left, rng)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), int(labels[answer]), inked


def cluttered_digit_pictures(
    split: Split, count: int, seed: int = 0, start: int = 0, size: int = IMAGE_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [count, size, size, 3] in 0..255 and labels [count]: ``start`` and following of an endless series.

    Picture i depends on (split, seed, i, size) alone. Answer and clutter come from the split's own scans only.
    """
    pictures, labels, _ = inked_digit_pictures(split, count, seed, start, size)
    return pictures, labels


def inked_digit_pictures(
    split: Split, count: int, seed: int = 0, start: int = 0, size: int = IMAGE_SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.int64], Floats]:
    """The same, and where the digit to be read has its ink: [count, size, size] in [0, 1]."""
    allowed, place = scan_indices(split), list(_SPLIT_ENDS).index(split)
    pictures = np.empty((count, size, size, 3), np.uint8)
    labels, inked = np.empty(count, np.int64), np.empty((count, size, size), np.float32)
    for i in range(count):
        rng = np.random.default_rng((place, seed, start + i))
        pictures[i], labels[i], inked[i] = _canvas(rng, allowed, size)
    return pictures, labels, inked


def normalise(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures [N, S, S, 3] in 0..255 to the model's input [N, 3, S, S]: (p / 255 - PIXEL_MEAN) / PIXEL_STD."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(PIXEL_MEAN).div(PIXEL_STD).contiguous()


def cluttered_digits(
    split: Split, count: int, seed: int = 0, start: int = 0, size: int = IMAGE_SIZE
) -> tuple[Tensor, Tensor]:
    """Normalised images [count, 3, size, size] and labels [count] of :func:`cluttered_digit_pictures`."""
    pictures, labels = cluttered_digit_pictures(split, count, seed, start, size)
    return normalise(pictures), torch.from_numpy(labels)
