"""Rows: the blocks of a tower that takes the tokens of all images of a call in one row [T, C].

In a row each image attends to itself, or to windows of itself, as segments of the row that the tower names. Images of
one size that lie side by side keep equally many tokens and are reduced as a batch; what is left of each stays in the
order of the row, so that its segments stay stretches of it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import UnsupportedModel
from tokenprune.host import BlockHost
from tokenprune.restore import restore_tokens
from tokenprune.row_parts import Part, in_order, starts_left, within
from tokenprune.site import Site
from tokenprune.state import Entry, TokenState, flow

if TYPE_CHECKING:
    from tokenprune.patch import Patch


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
            starts = starts_left(kwargs[self.lengths_argument], rows, state.parts)
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
                    now.bias = within(ids.unsqueeze(2) == ids.unsqueeze(1), now.bias)
                heads = [None if h is None else part.of(h[0].transpose(0, 1), start).transpose(1, 2) for h in captured]
                reduced, left = self._reduced(own, part.state, count, heads)
                if self.patch.probe is not None:
                    return x
                own, left = in_order(reduced, left, part.position)
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
