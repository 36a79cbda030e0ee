"""Rotary tables where an attention has fewer queries than keys: a host turns both with one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.denoisers.host import Slice


class Either:
    """A table [M, ...] of some tokens and the one [N, ...] of all; joined with a tensor, it is the one that fits it."""

    def __init__(self, some: Tensor, every: Tensor) -> None:
        self.some, self.every = some, every

    def __getitem__(self, at: Any) -> Either:
        return Either(self.some[at], self.every[at])

    def to(self, *args: Any, **kwargs: Any) -> Either:
        """As of a tensor."""
        return Either(self.some.to(*args, **kwargs), self.every.to(*args, **kwargs))

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        shape = next(x.shape for x in args if isinstance(x, Tensor))
        args = [x.fitting(shape) if isinstance(x, Either) else x for x in args]
        return function(*args, **(kwargs or {}))

    def fitting(self, shape: torch.Size) -> Tensor:
        """The one that a tensor of this shape can be multiplied with."""
        length = zip(reversed(self.some.shape), reversed(shape), strict=False)
        return self.some if all(one in (1, other) for one, other in length) else self.every


def for_either(take: Slice) -> Slice:
    """`take`, with the rows of all tokens beside those taken."""

    def taken(table: Any, index: Tensor, tokens: int, text: int) -> Any:
        if isinstance(table, tuple | list):
            return tuple(taken(part, index, tokens, text) for part in table)
        return Either(take(table, index, tokens, text), table)

    return taken
