"""Inpainting with the small DiT: originals, masks over their digits, and ways to draw anew what is under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import tokenprune
from tokenprune.evals.digits_pipelines import DigitsPipeline, pipeline_of
from tokenprune.evals.drawing_orders import drawing_orders
from tokenprune.evals.drawn_digits import IMAGE_SIZE, drawn_digit_pictures, to_model
from tokenprune.evals.shared_copy import shared_copy

STEPS = 10
"""Of a full run."""

PLACES = (11, 17, 25)
"""Rows and columns of the nine places in pixels: masks of MASKS pixels around them lie within the picture."""

MASKS = {"part": 12, "digit": 22}
"""Sides of the masks in pixels: 11% of the picture, a part of a digit, and 37%, where every digit fits in."""

BATCH = 10
ORIGINALS = 5
"""The series of `drawn_digit_pictures` that they are of."""


@dataclass(frozen=True)
class Way:
    """A way to inpaint: so many steps, and those of them at which `region` computes everything (None: no patch)."""

    name: str
    steps: int = STEPS
    dense: tuple[float, ...] | None = None


class Originals(NamedTuple):
    """images: [N, 3, 36, 36] in the models' space. labels: [N]. places: [N, 2], row and column in pixels. noise: as the
    images, to start from. Sorted by place."""

    images: Tensor
    labels: Tensor
    places: Tensor
    noise: Tensor


def originals(count: int, seed: int = 0, series: int = ORIGINALS) -> Originals:
    """The first `count` pictures of a series whose digit is within a pixel of one of the places, by place."""
    images, labels, places = list[Tensor](), list[Tensor](), list[Tensor]()
    corners = torch.cartesian_prod(torch.tensor(PLACES), torch.tensor(PLACES))
    start = 0
    while sum(map(len, labels)) < count:
        pictures, digits, centres = drawn_digit_pictures("test", 1000, series, start)
        start += len(pictures)
        off = (torch.from_numpy(centres)[:, None] - corners).abs().amax(2)
        nearest, place = off.min(1)
        chosen = nearest <= 1
        images.append(to_model(pictures[chosen.numpy()]))
        labels.append(torch.from_numpy(digits)[chosen])
        places.append(corners[place[chosen]])
    image, label, place = (torch.cat(parts)[:count] for parts in (images, labels, places))
    order = (place[:, 0] * IMAGE_SIZE + place[:, 1]).argsort(stable=True)
    return Originals(image[order], label[order], place[order], drawing_orders(count, seed).noise)


def mask_at(place: Tensor, side: int) -> Tensor:
    """A mask [36, 36] of zeros with a square of ones around `place` (row, column), on whole tokens."""
    top, left = (int(x) - side // 2 for x in place.tolist())
    top, left = top - top % 2, left - left % 2
    mask = torch.zeros(IMAGE_SIZE, IMAGE_SIZE)
    mask[top : top + side, left : left + side] = 1
    return mask


def batches(given: Originals, size: int = BATCH) -> list[Originals]:
    """At most `size` originals at a time, all of one place."""
    _, counts = torch.unique_consecutive(given.places, dim=0, return_counts=True)
    found, start = [], 0
    for count in counts.tolist():
        for first in range(start, start + count, size):
            last = min(first + size, start + count)
            found.append(Originals(*(part[first:last] for part in given)))
        start += count
    return found


def inpaint(pipe: DigitsPipeline, way: Way, batch: Originals, side: int) -> tuple[Tensor, float]:
    """Pictures [B, 3, 36, 36] in [0, 1] with the square under the mask drawn anew, and the run's multiply-adds over
    those of STEPS whole steps."""
    mask, ratio = mask_at(batch.places[0], side), 1.0
    drawer = pipe
    if way.dense is not None:
        drawer = pipeline_of(shared_copy(pipe.denoiser))
        tokenprune.patch(drawer, "region", mask=mask, dense_steps=way.dense)
    pictures = drawer(
        batch.labels, num_inference_steps=way.steps, latents=batch.noise, original=batch.images, mask=mask
    )
    if way.dense is not None:
        ratio = tokenprune.report(drawer).to_dict()["flops_ratio"]
    return pictures, ratio * way.steps / STEPS


def under(images: Tensor, places: Tensor, side: int) -> Tensor:
    """The squares [N, 3, side, side] of images [N, 3, 36, 36] that the masks at their places cover."""
    corners = [mask_at(place, side).nonzero()[0].tolist() for place in places]
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)])
