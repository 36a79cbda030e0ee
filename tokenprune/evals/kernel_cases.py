"""What the kernel benchmark runs: each operation at one size, by the naive formula, by plain torch and by us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.kernels import attention_mass, class_attention, matching
from tokenprune.kernels.attention_mass.reference import attention_mass as naive_mass
from tokenprune.kernels.class_attention.reference import class_attention as naive_class

SIZES = (64, 128, 197, 257, 577, 1025, 2048, 4096, 8192, 16384)
ITERATIONS = (1, 5, 30)
NAIVE = "naive"
PLAIN = "plain torch"


@dataclass(frozen=True)
class Case:
    """One operation at one size. arms: name -> a call without arguments; `naive` is the formula with the whole matrix,
    missing where that takes more than `LARGEST` bytes. names: the implementation that the dispatcher chose."""

    operation: str
    tokens: int
    batch: int
    heads: int
    dim: int
    iterations: int
    chosen: str
    arms: dict[str, Callable[[], Tensor]] = field(repr=False)


LARGEST = 5 * 2**30


def cases(device: str, dtype: torch.dtype, operations: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[Case]:
    """The cases, one after the other: only one holds its inputs at a time."""
    make = {"attention_mass": _mass_cases, "class_attention": _class_cases, "cosine_match": _match_cases}
    for operation in operations:
        for tokens in sizes:
            # A ViT-S with a batch that keeps the work of small sizes above what a clock can tell.
            batch, heads = (8, 6) if tokens <= 577 else (1, 8)
            yield from make[operation](tokens, batch, heads, device, dtype)
