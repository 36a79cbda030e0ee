"""Parts of a row: the tokens that are left of images of one size, and where they lie in the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.merge import gather
from tokenprune.state import TokenState


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one size in a row. state: of their tokens [images, n]. images: how many. start: where the first lies in
    the whole row. position: [entering] place of each original patch among the tokens of its image. whole: whether all
    tokens are left."""

    state: TokenState
    images: int
    start: int
    position: Tensor
    whole: bool = True

    @property
    def left(self) -> int:
        """Tokens of the row that are left."""
        return self.images * self.state.tokens

    def rows(self) -> Tensor:
        """Where each token that is left lies in the whole row, ascending: [images * n]."""
        assert self.state.origin is not None
        starts = torch.arange(self.images, device=self.position.device) * self.state.entering + self.start
        return (starts[:, None] + self.position[self.state.origin]).flatten()

    def sizes(self) -> Tensor:
        """Original patches in each token that is left: [images * n]."""
        sizes = self.state.sizes
        return self.position.new_ones(self.left, dtype=torch.float32) if sizes is None else sizes.flatten()

    def of(self, x: Tensor, start: int) -> Tensor:
        """The part's rows of x [t, ...] from `start` on, by image: [images, n, ...]."""
        return x[start : start + self.left].reshape(self.images, self.state.tokens, *x.shape[1:])


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Brings tokens back to the order in which they left, before they were put in that of the row. inverse: [B, K]."""

    inverse: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return gather(x, self.inverse)


def in_order(x: Tensor, state: TokenState, position: Tensor) -> tuple[Tensor, TokenState]:
    """Tokens x [B, K, C] that left a place, in the order of the row, and their state."""
    assert state.origin is not None
    order = position[state.origin].argsort(dim=1, stable=True)
    inverse = order.argsort(1)
    source = state.source
    if source is not None:
        source = torch.where(source < 0, -1, gather(inverse, source.clamp(min=0)))
    ordered = replace(
        state,
        origin=gather(state.origin, order),
        sizes=None if state.sizes is None else gather(state.sizes, order),
        source=source,
        undo=(*state.undo, _Sorted(inverse)) if state.undo else (),
    )
    return gather(x, order), ordered


def within(together: Tensor, bias: Tensor | None) -> Tensor:
    """A bias [B, 1, 1, n], or none, where `together` [B, n, n], and nothing elsewhere: [B, 1, n, n]."""
    mask = together.unsqueeze(1)
    return mask if bias is None else bias.expand(mask.shape).masked_fill(~mask, float("-inf"))


def starts_left(starts: Tensor, rows: Tensor, parts: Sequence[Part]) -> Tensor:
    """Where the segments start [segments + 1] of which at least one token is left: of a row of which `rows` are."""
    if rows.is_meta:  # counted, not run: as if every segment lost its share
        found = sorted({_left_before(int(place), parts) for place in starts})
        return torch.tensor(found, dtype=starts.dtype)
    segment = torch.bucketize(rows, starts[1:].to(rows.device), right=True)
    lengths = torch.bincount(segment, minlength=len(starts) - 1)
    lengths = lengths[lengths > 0]
    return functional.pad(lengths.cumsum(0), (1, 0)).to(starts)


def _left_before(place: int, parts: Sequence[Part]) -> int:
    left = 0
    for part in parts:
        entering = part.state.entering
        images, rest = divmod(min(max(place - part.start, 0), part.images * entering), entering)
        left += images * part.state.tokens + rest * part.state.tokens // entering
    return left
