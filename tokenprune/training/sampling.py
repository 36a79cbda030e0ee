"""The order of the images, which depends on the seed alone: on neither workers nor processes, nor on a kill."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenprune.evals.reading import from_workers

Turn = tuple[int, int]
"""An image's turn: the epoch, and which image."""


class Order(Sampler[list[Turn]]):
    """The batches of one of several processes: number k of an epoch and process p are images k * processes + p times
    the batch size and following, of a permutation of its own for each epoch.

    batches: in an epoch, of each process. start: how many are passed over.
    """

    def __init__(
        self, images: int, batch_size: int, batches: int, epochs: int, *, seed: int, process: int, processes: int
    ) -> None:
        self.images, self.batch_size, self.batches, self.epochs = images, batch_size, batches, epochs
        self.seed, self.process, self.processes = seed, process, processes
        self.start = 0

    def __len__(self) -> int:
        return self.batches * self.epochs - self.start

    def __iter__(self) -> Iterator[list[Turn]]:
        current, order = -1, list[int]()
        for number in range(self.start, self.batches * self.epochs):
            epoch, batch = divmod(number, self.batches)
            if epoch != current:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                current, order = epoch, torch.randperm(self.images, generator=generator).tolist()
            first = (batch * self.processes + self.process) * self.batch_size
            yield [(epoch, image) for image in order[first : first + self.batch_size]]


class ByTurn(Dataset[tuple[Tensor, int]]):
    """`items`, of which each is drawn by its turn and the seed: random augmentations are the same in every run."""

    def __init__(self, items: Dataset[tuple[Tensor, int]], seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, turn: Turn) -> tuple[Tensor, int]:
        digest = hashlib.sha256(f"{self.seed} {turn[0]} {turn[1]}".encode()).digest()
        with drawn_by(int.from_bytes(digest[:4], "little")):
            return self.items[turn[1]]


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, torch (of the CPU) and, where it is in use, NumPy, and put them back."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), numpy.random.get_state() if numpy is not None else None
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])


def loader(items: Dataset[tuple[Tensor, int]], order: Order, *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images [b, C, H, W], labels [b]) in that order. It draws from no global generator."""
    generator = torch.Generator().manual_seed(order.seed)
    batches: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        ByTurn(items, order.seed),  # type: ignore[arg-type]  # collated, the items are batches
        batch_sampler=order,
        num_workers=workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )
    return from_workers(batches)
