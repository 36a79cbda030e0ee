"""The image sets that need no download, ready for `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.evals.data import ImageData, open_data


def digits_data(count: int, seed: int) -> ImageData:
    """`count` test pictures of the shipped digits task, drawn anew for each `seed`, as `digits-vit` takes them."""
    from tokenprune.evals.digits import NUM_CLASSES, cluttered_digits

    data = open_data(cluttered_digits("test", count, seed))
    return ImageData("cluttered digits (test)", data.items, data.size, NUM_CLASSES)


def photographs_data(size: int, mean: Sequence[float], std: Sequence[float]) -> ImageData:
    """The photographs of scikit-image and scikit-learn, in crops of `size` pixels that count as one per photograph."""
    from tokenprune.evals.images import photographs

    pictures, names = photographs(size)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([numbers[name] for name in names])
    data = open_data(_normalized(pictures, mean, std))
    return ImageData("photographs", data.items, data.size, None, groups)


def openclipart_data(folder: Path, size: int, mean: Sequence[float], std: Sequence[float]) -> ImageData:
    """The Debian package openclipart-png, unpacked in `folder`: drawings by kind, for nearest neighbours.

    Raises TokenPruneError where there are no drawings.
    """
    from tokenprune.evals.openclipart import openclipart

    try:
        drawings = openclipart(folder, size)
    except FileNotFoundError as error:
        raise TokenPruneError(str(error)) from error
    data = open_data((_normalized(drawings.images, mean, std), drawings.labels))
    return ImageData("openclipart", data.items, data.size, len(drawings.classes), drawings.groups, drawings.is_test)


def _normalized(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures of bytes [N, C, H, W] as model inputs."""
    shape = (1, -1, 1, 1)
    return (pictures.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
