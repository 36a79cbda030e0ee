"""The image sets that need no download, ready for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import ImageData, open_data
from tokenprune.evals.streams import UNLABELLED

if TYPE_CHECKING:
    from tokenprune.evals.digits import Split


def digits_data(count: int, seed: int, split: Split = "test", size: int | None = None) -> ImageData:
    """`count` pictures of the shipped digits task, drawn anew for each `seed`, normalised, of `size` pixels; None for
    those that `digits-vit` takes."""
    from tokenprune.evals.digits import IMAGE_SIZE, NUM_CLASSES, cluttered_digits

    data = open_data(cluttered_digits(split, count, seed, size=size or IMAGE_SIZE))
    return ImageData(f"cluttered digits ({split})", data.items, data.size, NUM_CLASSES)


def masks_data(count: int, seed: int) -> ImageData:
    """`count` pictures of the test scans with the class of each cell, see `tokenprune.evals.digit_masks`."""
    from tokenprune.evals.digit_masks import CLASSES, masked_digits

    data = open_data(masked_digits("test", count, seed))
    return ImageData("masks of cluttered digits (test)", data.items, data.size, CLASSES, dense=True)


def digits_training(count: int, seed: int, size: int | None = None) -> ImageData:
    """The first `count` pictures of the training scans for a `seed`, each drawn when it is asked for, of `size` pixels;
    None for those that `digits-vit` takes."""
    from tokenprune.evals.digits import IMAGE_SIZE, NUM_CLASSES

    return ImageData("cluttered digits (train)", _DrawnDigits(seed, size or IMAGE_SIZE), count, NUM_CLASSES)


def masks_training(count: int, seed: int) -> ImageData:
    """The same pictures with the class of each cell, see `tokenprune.evals.digit_masks`."""
    from tokenprune.evals.digit_masks import CLASSES

    return ImageData("masks of cluttered digits (train)", _DrawnMasks(seed), count, CLASSES, dense=True)


def blurred_data(count: int, seed: int, *, size: int) -> ImageData:
    """`count` crops of `size` pixels of the test photographs, blurred in part, see `tokenprune.evals.local_blur`."""
    from tokenprune.evals.local_blur import locally_blurred

    return replace(open_data(locally_blurred("test", count, seed, size=size).images), name="blurred photographs (test)")


def photographs_data(size: int, mean: Sequence[float], std: Sequence[float]) -> ImageData:
    """The photographs of scikit-image and scikit-learn, in crops of `size` pixels that count as one per photograph."""
    from tokenprune.evals.images import photographs

    pictures, names = photographs(size)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([numbers[name] for name in names])
    return ImageData("photographs", _Pictures(pictures, None, mean, std), len(pictures), None, groups)


def openclipart_data(folder: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> ImageData:
    """The Debian package openclipart-png, unpacked in `folder`: drawings by kind, for nearest neighbours.

    Raises TokenPruneError where there are no drawings.
    """
    from tokenprune.evals.openclipart import openclipart

    try:
        drawings = openclipart(folder, size)
    except FileNotFoundError as error:
        raise TokenPruneError(str(error)) from error
    items = _Pictures(drawings.images, drawings.labels, mean, std)
    return ImageData("openclipart", items, len(items), len(drawings.classes), drawings.groups, drawings.is_test)


class _DrawnDigits(Dataset[tuple[Tensor, int]]):
    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from tokenprune.evals.digits import cluttered_digit_pictures, normalise

        pictures, labels = cluttered_digit_pictures("train", 1, self.seed, index, size=self.size)
        return normalise(pictures)[0], int(labels[0])


class _DrawnMasks(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from tokenprune.evals.digit_masks import masked_digits

        images, masks = masked_digits("train", 1, self.seed, index)
        return images[0], masks[0]


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures of bytes [N, C, H, W], made model inputs one at a time: floats would take four times the room."""

    def __init__(self, pictures: Tensor, labels: Tensor | None, mean: Sequence[float], std: Sequence[float]) -> None:
        self.pictures, self.labels = pictures, labels
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (self.pictures[index].float() / 255 - self.mean) / self.std
        return image, UNLABELLED if self.labels is None else int(self.labels[index])
