"""What the small vision-language model is asked about: three handwritten digits of different colours on one canvas.

The scans are those of :mod:`tokenprune.evals.digits` with the same split. Each digit lies in a cell of its own of a
4 x 4 grid, its centre within three pixels of the cell's, so that row and column are never in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenprune.evals.digits import NUM_CLASSES, TILT, Split, cover, enlarge, gradient, scan_indices, scans

IMAGE_SIZE = 64
PATCH = 8
GRID = IMAGE_SIZE // PATCH
PLACES = 4
DIGITS = 3
DIGIT_SIZE = (13, 16)
OFF_CENTRE = 3
# Share of a patch that is ink, from which on the patch counts as the digit's.
INKED = 0.15
COLOURS = {
    "red": (1.0, 0.25, 0.25),
    "green": (0.25, 1.0, 0.3),
    "blue": (0.35, 0.5, 1.0),
    "yellow": (1.0, 0.95, 0.25),
    "violet": (1.0, 0.4, 1.0),
    "white": (0.95, 0.95, 0.95),
}
NOTHING = -1
PIXEL_MEAN = 0.25
PIXEL_STD = 0.2
_SERIES = {"train": 6, "val": 7, "test": 8}


@dataclass(frozen=True)
class Scenes:
    """Canvases and what is on them.

    pictures: [N, 64, 64, 3] in 0..255. digits, colours, rows, columns: [N, 3], of the digits in the order in which they
    were drawn; colours in the order of COLOURS, rows and columns of the 4 x 4 cells. patches: [N, 8, 8], which of the
    three has its ink there, NOTHING for none.
    """

    pictures: NDArray[np.uint8]
    digits: NDArray[np.int64]
    colours: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    patches: NDArray[np.int64]


def placed_digits(split: Split, count: int, seed: int = 0, start: int = 0) -> Scenes:
    """`count` scenes: ``start`` and following of an endless series.

    Scene i depends on (split, seed, i) alone. Its digits come from the split's own scans.
    """
    pictures = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    patches = np.empty((count, GRID, GRID), np.int64)
    drawn = np.empty((4, count, DIGITS), np.int64)
    for i in range(count):
        rng = np.random.default_rng((_SERIES[split], seed, start + i))
        pictures[i], drawn[:, i], patches[i] = _scene(rng, split)
    return Scenes(pictures, drawn[0], drawn[1], drawn[2], drawn[3], patches)


def _scene(rng: np.random.Generator, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    ink, labels = scans()
    allowed, side = scan_indices(split), IMAGE_SIZE // PLACES
    canvas, patches = gradient(rng, IMAGE_SIZE), np.full((GRID, GRID), NOTHING)
    digits, colours = rng.permutation(NUM_CLASSES)[:DIGITS], rng.permutation(len(COLOURS))[:DIGITS]
    rows, columns = np.divmod(rng.permutation(PLACES * PLACES)[:DIGITS], PLACES)
    for i in range(DIGITS):
        scan = rng.choice(allowed[labels[allowed] == digits[i]])
        height, width = rng.integers(DIGIT_SIZE[0], DIGIT_SIZE[1] + 1, 2)
        y, x = rng.integers(-OFF_CENTRE, OFF_CENTRE + 1, 2)
        top = int(np.clip((rows[i] + 0.5) * side - height / 2 + y, 0, IMAGE_SIZE - height))
        left = int(np.clip((columns[i] + 0.5) * side - width / 2 + x, 0, IMAGE_SIZE - width))
        strokes = enlarge(ink[scan], height, width, rng.uniform(-TILT, TILT))
        shade = np.float32(rng.uniform(0.8, 1.0))
        cover(canvas, strokes, top, left, shade * np.array(list(COLOURS.values())[colours[i]], np.float32))
        share = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        share[top : top + height, left : left + width] = strokes
        patches[share.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) > INKED] = i
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), np.stack([digits, colours, rows, columns]), patches
