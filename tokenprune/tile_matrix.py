"""TileMatrix: a dense merge in which every leaving token takes tokens of its own tile of the grid alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TileMatrix:
    """A matrix [B, K, n] whose rows and columns are those of T tiles: of these the blocks that are not zero.

    weights: [B T, k, m] of the at most k leaving tokens and m tokens of each tile, zero where it has fewer; in one
    dimension as a compiler makes graphs of their own for an image of a single tile, of size 1. members: [T m] positions
    of the tokens, any where a tile has fewer. slots: [n] where each token stands among them. rows: [K] which of the T k
    rows leave. filled: [T k] a leaving token for each row, any where a tile has fewer.
    """

    weights: Tensor
    members: Tensor
    slots: Tensor
    rows: Tensor
    filled: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens that leave, K."""
        return self.rows.shape[0]

    @property
    def full(self) -> bool:
        """Whether it is known that every row leaves; a compiler, whose graphs are to be of any size, is not to ask."""
        return not torch.compiler.is_compiling() and self.tokens == self.filled.shape[0]

    def merge(self, x: Tensor) -> Tensor:
        """The matrix times x [B, n, C]: [B, K, C]."""
        inside = _split(x.index_select(1, self.members), self.weights.shape[2])
        leaving = _split(torch.bmm(self.weights.to(x.dtype), inside), self.filled.shape[0])
        return leaving if self.full else leaving.index_select(1, self.rows)

    def unmerge(self, reduced: Tensor) -> Tensor:
        """Its transpose, each token's shares rescaled to sum to one, times `reduced` [B, K, C]: [B, n, C]."""
        shares = self.weights.to(reduced.dtype).transpose(1, 2)
        rows = reduced if self.full else reduced.index_select(1, self.filled)
        back = torch.bmm(shares, _split(rows, self.weights.shape[1]))
        # Of a token that is none all shares are zero.
        back = back / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
        return _split(back, self.members.shape[0]).index_select(1, self.slots)

    def dense(self) -> Tensor:
        """[B, K, n]."""
        _, k, m = self.weights.shape
        tiles = self.members.shape[0] // m
        weights = self.weights.view(-1, tiles, k, m)
        batch = weights.shape[0]
        blocks = weights.new_zeros(batch, tiles, k, tiles, m)
        blocks = blocks.diagonal_scatter(weights.permute(0, 2, 3, 1), 0, 1, 3)
        return blocks.view(batch, tiles * k, tiles * m)[:, self.rows][:, :, self.slots]

    def tiled(self, copies: int) -> TileMatrix:
        """The same for a batch that holds `copies` of its images, one after the other."""
        return replace(self, weights=self.weights.repeat(copies, 1, 1))

    def compile_for_any_size(self) -> None:
        """Ask a compiler for one graph for all grids, whose numbers of tiles and of tokens in them may be the same by
        chance."""
        for x in (self.weights, self.members, self.slots, self.rows, self.filled):
            torch._dynamo.maybe_mark_dynamic(x, list(range(x.ndim)))


def _split(x: Tensor, length: int) -> Tensor:
    """[b, n, C] to [b n / length, length, C]: by way of [b n, C], as a compiler asks of one reshape whether the first
    size stays as it is, which it does where there is one tile."""
    return torch.unflatten(x.flatten(0, 1), 0, (-1, length))
