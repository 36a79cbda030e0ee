"""Reduction: the one object through which every per-token tensor is re-indexed, merged and brought back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.kernels.inputs import EPSILON, precision
from tokenprune.kernels.merge import gather, merge, merge_sizes, source
from tokenprune.kernels.merge.eager import flat_rows
from tokenprune.tables import positions
from tokenprune.tile_matrix import TileMatrix


# eq=False: up to torch 2.11 the compiler hashes an object that is called, by its fields, which it has not set yet.
@dataclass(frozen=True, eq=False)
class Reduction:
    """Which of n tokens leave a place, and what becomes of the others.

    Three forms: an *index* (only `kept`: the others are dropped), *groups* (`moved` tokens are added, weighted, to the
    leaving token `target`) and a *dense* matrix [B, K, n] for soft clusterings, or the blocks of one.

    kept: [B, K'] positions that leave, in the order in which they leave. moved: [B, M] positions that are merged; what
    is neither kept nor moved is dropped. target: [B, M] position among the K leaving tokens that takes each moved one.
    weights: [B, M] share with which a moved token enters a fused token appended at the end (EViT); None where merging
    is an average. average: of a group, weighted by "size", with "equal" weights, or that by size rescaled to the
    largest "norm" in the group (MLERP, Kim et al., "Token Fusion", WACV 2024, section 3.3). shares: [B, M] of its size
    with which a moved token adds to that of its target; None for all of it. tiles: instead of `matrix`, one in which
    every token stays in its tile of the grid.
    """

    kept: Tensor
    moved: Tensor | None = None
    target: Tensor | None = None
    weights: Tensor | None = None
    matrix: Tensor | None = None
    average: Literal["size", "equal", "norm"] = "size"
    shares: Tensor | None = None
    tiles: TileMatrix | None = None

    @property
    def dense(self) -> Tensor | None:
        """The matrix [B, K, n] of the dense form, None of another."""
        return self.matrix if self.tiles is None else self.tiles.dense()

    @property
    def mixes(self) -> bool:
        """Whether it is of the dense form."""
        return self.matrix is not None or self.tiles is not None

    @property
    def merges(self) -> bool:
        """Whether tokens are merged into others that leave."""
        return self.moved is not None and not self.fuses

    @property
    def is_index(self) -> bool:
        """Whether the tokens that do not leave are dropped."""
        return not self.mixes and self.moved is None

    @property
    def fuses(self) -> bool:
        """Whether one more token, the weighted sum of the moved ones, is appended."""
        return self.weights is not None

    @property
    def averages_by_size(self) -> bool:
        """Whether tokens are averaged by size, as `merge` does it with their sizes."""
        plain = not self.mixes and self.weights is None and self.shares is None and self.average == "size"
        return plain and self.moved is not None and self.moved.shape[1] > 0

    @property
    def tokens(self) -> int:
        """Number of tokens that leave, K."""
        if self.tiles is not None:
            return self.tiles.tokens
        if self.matrix is not None:
            return self.matrix.shape[1]
        return self.kept.shape[1] + int(self.fuses)

    def merged_sizes(self, sizes: Tensor) -> Tensor:
        """Original patches in each leaving token, from those entering: [B, n] -> [B, K], in the dtype of `sizes`."""
        if (matrix := self.dense) is not None:
            return torch.bmm(matrix.to(sizes.dtype), sizes.unsqueeze(-1)).squeeze(-1)
        if self.moved is None:
            return sizes.gather(1, self.kept)
        if self.fuses:
            return torch.cat([sizes.gather(1, self.kept), sizes.gather(1, self.moved).sum(1, keepdim=True)], 1)
        assert self.target is not None
        if self.shares is not None:
            added = gather(sizes, self.moved) * self.shares.to(sizes.dtype)
            return gather(sizes, self.kept).scatter_add(1, self.target, added)
        return merge_sizes(sizes, self.kept, self.moved, self.target)

    def __call__(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Reduce x [B, n, C] to [B, K, C]; merged groups are averages, weighted by `sizes` [B, n] (None: all one)."""
        if self.tiles is not None:
            return self.tiles.merge(x)
        if self.matrix is not None:
            return torch.bmm(self.matrix.to(x.dtype), x)
        if self.moved is None or self.moved.shape[1] == 0:
            return gather(x, self.kept)
        if self.weights is not None:
            fused = torch.bmm(self.weights.to(x.dtype).unsqueeze(1), gather(x, self.moved))
            return torch.cat([gather(x, self.kept), fused], 1)
        assert self.target is not None
        merged = merge(x, self.kept, self.moved, self.target, None if self.average == "equal" else sizes)[0]
        return self._as_long(merged, x) if self.average == "norm" else merged

    def _as_long(self, merged: Tensor, x: Tensor) -> Tensor:
        """`merged` [B, K, C], each group's average as long as its longest member of x [B, n, C]."""
        assert self.moved is not None
        assert self.target is not None
        lengths = torch.linalg.vector_norm(x.to(precision(x)), dim=-1)
        longest = gather(lengths, self.kept).scatter_reduce(1, self.target, gather(lengths, self.moved), "amax")
        own = torch.linalg.vector_norm(merged.to(longest.dtype), dim=-1).clamp_min(EPSILON)
        grown = (merged * (longest / own).unsqueeze(-1)).to(x.dtype)
        took = torch.zeros_like(self.kept, dtype=torch.bool).scatter(1, self.target, True)
        return torch.where(took.unsqueeze(-1), grown, merged)

    def with_sizes(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """self(x, sizes) and `merged_sizes` [B, K] at once, where tokens are averaged by size."""
        assert self.moved is not None
        assert self.target is not None
        leaving, merged = merge(x, self.kept, self.moved, self.target, sizes)
        return leaving, merged.detach() if merged.requires_grad else merged

    def with_prefix(self, count: int) -> Reduction:
        """The same behind `count` tokens in front of the n, which stay where they are; not of a dense matrix."""
        if count == 0:
            return self
        assert not self.mixes
        own = positions(count, self.kept).expand(self.kept.shape[0], -1)
        moved, target = (None if index is None else index + count for index in (self.moved, self.target))
        return replace(self, kept=torch.cat([own, self.kept + count], 1), moved=moved, target=target)

    def follow(self, table: Tensor | None) -> Tensor:
        """Re-index a per-token table that cannot be averaged (positions, origins): [B, n] -> [B, K]; None: of the
        positions themselves.

        A merged token keeps the entry of the token it was merged into, a fused one that of its heaviest member, a
        dense one that of its largest weight.
        """
        index = self.kept
        if (matrix := self.dense) is not None:
            index = matrix.argmax(-1)
        elif self.weights is not None and self.moved is not None:
            index = torch.cat([index, self.moved.gather(1, self.weights.argmax(1, keepdim=True))], 1)
        return index if table is None else table.gather(1, index)

    def source(self, entering: int) -> Tensor:
        """For each of the `entering` tokens, the leaving position that represents it, or -1: [B, entering]."""
        if (matrix := self.dense) is not None:
            return matrix.argmax(1)
        target = self.target
        if self.fuses and self.moved is not None:
            target = torch.full_like(self.moved, self.kept.shape[1])
        return source(self.kept, self.moved, target, entering)

    def bring_back(self, reduced: Tensor, entered: Tensor, full: Tensor) -> Tensor:
        """full [B, n, C] after something was computed on its reduction: `entered` [B, K, C] went in, `reduced` came
        out.

        A kept token takes its new value, a dropped one keeps its old one; a merged one gains what its group gained.
        """
        if self.is_index:
            return Rows(self.kept, full.shape[1]).put(full, reduced)
        source = self.source(full.shape[1])
        gained = gather(reduced - entered, source.clamp(min=0))
        return torch.where((source >= 0).unsqueeze(-1), full + gained, full)

    def unmerge(self, reduced: Tensor, entering: int) -> Tensor:
        """[B, K, C] -> [B, n, C]: each of the `entering` tokens takes the value of the one that it was merged into.

        A dense matrix is transposed, with each token's shares rescaled to sum to one (ToMA, Lu et al., 2025).
        """
        if self.tiles is not None:
            return self.tiles.unmerge(reduced)
        if self.matrix is None:
            return gather(reduced, self.source(entering))
        shares = self.matrix.to(reduced.dtype)
        return torch.bmm(shares.transpose(1, 2), reduced) / shares.sum(1).unsqueeze(-1)

    def tiled(self, copies: int) -> Reduction:
        """The same for a batch that holds `copies` of its images, one after the other."""
        if copies == 1:
            return self
        names = ("kept", "moved", "target", "weights", "matrix", "shares")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        tiled: dict[str, Any] = {name: _tiled(part, copies) for name, part in parts.items()}
        return replace(self, **tiled, tiles=None if self.tiles is None else self.tiles.tiled(copies))


class Rows:
    """An index [B, K] among the `tokens` of each image, made ready for all the tensors [B, n, C] of which these tokens
    are taken, or among which they are put back."""

    def __init__(self, index: Tensor, tokens: int) -> None:
        self.shape = index.shape
        batch = index.shape[0]
        self.shared = batch == 1 or (batch > 1 and index.stride(0) == 0)
        if self.shared:  # one row for all images
            self.flat = index[0]
        else:
            self.flat = flat_rows(index, tokens)

    def take(self, x: Tensor) -> Tensor:
        """x [B, n, C] to [B, K, C]."""
        if self.shared:
            return x.index_select(1, self.flat)
        # Whole rows are copied wherever they lie one behind another in memory.
        return x.reshape(-1, x.shape[-1]).index_select(0, self.flat).view(*self.shape, x.shape[-1])

    def put(self, full: Tensor, reduced: Tensor) -> Tensor:
        """full [B, n, C] with the values `reduced` [B, K, C] of these tokens."""
        if self.shared:
            return full.index_copy(1, self.flat, reduced)
        rows = full.reshape(-1, full.shape[-1])
        return rows.index_copy(0, self.flat, reduced.reshape(-1, full.shape[-1])).view_as(full)


def _tiled(part: Tensor, copies: int) -> Tensor:
    """Without a copy where all images have the same."""
    others = [-1] * (part.ndim - 1)
    if part.shape[0] == 1 or part.stride(0) == 0:
        return part[:1].expand(copies * part.shape[0], *others)
    return part.repeat(copies, *[1] * (part.ndim - 1))
