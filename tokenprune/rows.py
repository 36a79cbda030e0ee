"""Rows: the blocks of a tower that takes the tokens of all images of a call in one row [T, C].

In a row each image attends to itself, or to windows of itself, as segments of the row that the tower names. Images of
one size that lie side by side keep equally many tokens and are reduced as a batch; what is left of each stays in the
order of the row, so that its segments stay stretches of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import UnsupportedModel
from tokenprune.host import BlockHost
from tokenprune.kernels.merge import gather
from tokenprune.restore import restore_tokens
from tokenprune.site import Site
from tokenprune.state import Entry, TokenState, flow

if TYPE_CHECKING:
    from tokenprune.patch import Patch


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


class RowSite(Site):
    """Hooks of a block in whose row several images lie."""

    def __init__(self, patch: Patch, index: int, facts: BlockHost, *, reduces: bool, mid: bool) -> None:
        super().__init__(patch, index, facts, reduces=reduces, mid=mid)
        self.lengths_argument = facts.lengths_argument
        self.longest_argument = facts.longest_argument

    def _entered(self, x: Tensor, entry: Entry | None) -> TokenState:
        row = entry.row if entry is not None and self.index == 0 else None
        if entry is None or row is None or sum(part.images * part.tokens for part in row) != x.shape[0]:
            raise UnsupportedModel(
                f"which of the {x.shape[0]} tokens that {self.name} is given belong to which image is not known; run"
                " the tower by its own forward, or unpatch it"
            )
        starts = accumulate((stretch.images * stretch.tokens for stretch in row), initial=0)
        parts = []
        for stretch, start in zip(row, starts, strict=False):
            order = stretch.order.to(x.device)
            position = order.argsort()
            forward = self.patch.new_forward(stretch.grid)
            state = TokenState(
                stretch.tokens,
                stretch.tokens,
                origin=order.expand(stretch.images, -1),
                source=position.expand(stretch.images, -1) if forward is not None else None,
                grid=stretch.grid,
                forward=forward,
                dense=entry.dense,
            )
            parts.append(Part(state, stretch.images, start, position))
        self.patch.entered = max((stretch.tokens for stretch in row), default=self.patch.tokens)
        return TokenState(x.shape[0], x.shape[0], dense=entry.dense, parts=tuple(parts))

    def _first_tokens(self, x: Tensor, state: TokenState, count: int) -> tuple[Tensor, TokenState]:
        (part,) = state.parts
        assert part.state.origin is not None
        own = replace(part.state, tokens=count, origin=part.state.origin[:, :count])
        return x[:count], replace(state, tokens=count, parts=(replace(part, state=own, whole=False),))

    def _reindexed(self, kwargs: dict[str, Any], state: TokenState, dtype: torch.dtype) -> dict[str, Any]:
        now = flow()
        kwargs, name = dict(kwargs), self.rope_argument
        assert name is not None
        if not all(part.whole for part in state.parts):
            rows = torch.cat([part.rows() for part in state.parts])
            kwargs[name] = tuple(table.index_select(0, rows) for table in kwargs[name])
            starts = _starts(kwargs[self.lengths_argument], rows, state.parts)
            kwargs[self.lengths_argument] = starts
            if kwargs.get(self.longest_argument) is not None:
                longest = starts.diff().max()
                as_given = isinstance(kwargs[self.longest_argument], Tensor)
                kwargs[self.longest_argument] = longest if as_given else int(longest)
        if self.patch.method.proportional and any(part.state.sizes is not None for part in state.parts):
            assert self.key_bias is not None
            sizes = torch.cat([part.sizes() for part in state.parts])
            kwargs[self.key_bias] = now.bias = sizes.log().to(dtype)[None, None, None]
        now.rope, now.kwargs = kwargs[name], kwargs
        return kwargs

    def resume(self, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Take up again the block that is run once more."""
        super().resume(x, kwargs)
        flow().kwargs = kwargs

    def reduce(self, x: Tensor) -> Tensor:
        """Score, select and reduce the tokens of x [t, C], for the images of each size by themselves."""
        now = flow()
        state = now.state
        if not self.reduces or state is None:
            return x
        counts = [self.patch.leaving(self.index, part.state) for part in state.parts]
        if all(count is None for count in counts):
            return x
        captured, rope, before, bias = self.taps.captured(), now.rope, now.before, now.bias
        assert isinstance(rope, tuple)
        segment = self._segments(x, state) if "queries" in self.patch.method.needs else None
        self.patch.mark(self, "score")
        leaving, parts, start = [], [], 0
        for part, count in zip(state.parts, counts, strict=True):
            own = part.of(x, start)
            if count is not None:
                now.rope = tuple(part.of(table, start).unsqueeze(1) for table in rope)
                now.before = None if before is None else part.of(before, start)
                now.bias = None if bias is None else part.of(bias[0, 0, 0], start)[:, None, None]
                if segment is not None:
                    ids = part.of(segment, start)
                    now.bias = _within(ids.unsqueeze(2) == ids.unsqueeze(1), now.bias)
                heads = [None if h is None else part.of(h[0].transpose(0, 1), start).transpose(1, 2) for h in captured]
                reduced, left = self._reduced(own, part.state, count, heads)
                if self.patch.probe is not None:
                    return x
                own, left = _in_order(reduced, left, part.position)
                parts.append(replace(part, state=left, whole=False))
            else:
                parts.append(part)
            leaving.append(own.flatten(0, 1))
            start += part.left
        now.rope, now.before, now.bias = rope, before, bias
        row = torch.cat(leaving)
        now.state = replace(state, tokens=row.shape[0], parts=tuple(parts), reduced=None)
        return row

    def _segments(self, x: Tensor, state: TokenState) -> Tensor | None:
        """[t] the segment of each token, where images are made of several."""
        starts = (flow().kwargs or {})[self.lengths_argument]
        if len(starts) - 1 <= sum(part.images for part in state.parts):
            return None
        return torch.bucketize(torch.arange(x.shape[0], device=x.device), starts[1:].to(x.device), right=True)

    def _full(self, output: Tensor, state: TokenState, *, last: bool) -> Tensor | None:
        if self.index not in state.dense:
            return None
        if self.patch.probe is not None:
            return functional.pad(output, (0, 0, 0, state.entering - output.shape[0]))
        if not any(part.state.undo for part in state.parts):
            return None
        starts = accumulate((part.left for part in state.parts), initial=0)
        whole = [
            restore_tokens(part.of(output, start), part.state, 0).flatten(0, 1)
            for part, start in zip(state.parts, starts, strict=False)
        ]
        return torch.cat(whole)


def _in_order(x: Tensor, state: TokenState, position: Tensor) -> tuple[Tensor, TokenState]:
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


def _within(together: Tensor, bias: Tensor | None) -> Tensor:
    """A bias [B, 1, 1, n], or none, where `together` [B, n, n], and nothing elsewhere: [B, 1, n, n]."""
    mask = together.unsqueeze(1)
    return mask if bias is None else bias.expand(mask.shape).masked_fill(~mask, float("-inf"))


def _starts(starts: Tensor, rows: Tensor, parts: Sequence[Part]) -> Tensor:
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
