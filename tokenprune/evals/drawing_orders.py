"""What the diffusion models are asked to draw, and the noise that they start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.evals.digits import NUM_CLASSES
from tokenprune.evals.digits_denoisers import PLACES
from tokenprune.evals.drawn_digits import IMAGE_SIZE


class Orders(NamedTuple):
    """labels: [N]. centres: [N, 2], row and column in pixels. noise: [N, 3, 36, 36]."""

    labels: Tensor
    centres: Tensor
    noise: Tensor

    def first(self, count: int) -> Orders:
        """The first `count` orders."""
        return Orders(*(part[:count] for part in self))

    def batches(self, size: int) -> Iterator[Orders]:
        """`size` orders at a time."""
        for start in range(0, len(self.labels), size):
            yield Orders(*(part[start : start + size] for part in self))


def drawing_orders(count: int, seed: int) -> Orders:
    """Every digit in turn, in every ninth of the picture in turn; order i depends on (seed, i) alone."""
    numbers = torch.arange(count)
    place = numbers // NUM_CLASSES
    thirds = torch.stack([place // PLACES % PLACES, place % PLACES], dim=1)
    noise = [
        torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1_000_003 * seed + i))
        for i in range(count)
    ]
    return Orders(numbers % NUM_CLASSES, (thirds + 0.5) * (IMAGE_SIZE / PLACES), torch.stack(noise))
