"""Gathering and merging in plain torch: differentiable, on any device, and traced as torch's own operations."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.tables import positions, table


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index` [B, K] of x [B or 1, ..., N, ...] along `dim`.

    On a CPU whole rows are copied wherever they lie one behind another in memory, as torch.gather copies element by
    element; on a GPU that is one launch, and the rows' places among those of all images are four more.
    """
    batch, count = index.shape
    if x.shape[0] == 1:
        rows = x[0].index_select(dim - 1, index.reshape(-1))
        return rows.reshape(*x.shape[1:dim], batch, count, *x.shape[dim + 1 :]).movedim(dim - 1, 0)
    if dim == 1 and x.ndim > 2 and not x.is_cuda:
        rows = x.reshape(-1, *x.shape[2:]).index_select(0, flat_rows(index, x.shape[1]))
        return rows.reshape(batch, count, *x.shape[2:])
    along = index.reshape(batch, *(1,) * (dim - 1), count, *(1,) * (x.ndim - dim - 1))
    return x.gather(dim, along.expand(*x.shape[:dim], count, *x.shape[dim + 1 :]))


def flat_rows(index: Tensor, count: int) -> Tensor:
    """Positions [B, K] among `count` of each image, as positions [B K] among those of all."""
    return (index + table(_first_rows, index.shape[0], count, like=index)).reshape(-1)


def _first_rows(batch: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device).unsqueeze(1) * count


def merge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Averages weighted by size (None: one each) of groups of x [B, n, C], and their sizes; in float32 at least before
    it is rounded."""
    if sizes is None:
        return _merge_of_one(x, kept, moved, target)
    moved_sizes = gather(sizes, moved, 1)
    merged_sizes = gather(sizes, kept, 1).scatter_add(1, target, moved_sizes)
    out = gather(x, kept, 1).to(torch.promote_types(x.dtype, sizes.dtype))
    # x_t + sum of s_m / S (x_m - x_t) is the average of the group, and touches none but the rows that it changes.
    share = moved_sizes / gather(merged_sizes, target, 1)
    rows, flat = flat_rows(target, kept.shape[1]), out.flatten(0, 1)
    # In place: memory that is new costs a CPU more than the arithmetic.
    pull = gather(x, moved, 1).flatten(0, 1).to(flat.dtype).sub_(flat.index_select(0, rows)).mul_(share.reshape(-1, 1))
    # By whole rows, as in `gather`: scatter_add takes four times as long on a CPU.
    flat.index_add_(0, rows, pull)
    return out.to(x.dtype), merged_sizes


def _merge_of_one(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge` of tokens that are of one patch each: a sum and a quotient, which leaves groups of one as they are."""
    sizes = x.new_ones(kept.shape, dtype=torch.float32)
    sizes = sizes.scatter_add(1, target, sizes.new_ones(target.shape))
    out = gather(x, kept, 1).to(torch.promote_types(x.dtype, sizes.dtype))
    flat = out.flatten(0, 1)
    flat.index_add_(0, flat_rows(target, kept.shape[1]), gather(x, moved, 1).flatten(0, 1).to(flat.dtype))
    return out.div_(sizes.unsqueeze(-1)).to(x.dtype), sizes


def merge_sizes(sizes: Tensor, kept: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """The sizes [B, K] alone that `merge` gives: those of the kept tokens and of the moved ones added to theirs."""
    return gather(sizes, kept, 1).scatter_add(1, target, gather(sizes, moved, 1))


def source(kept: Tensor, moved: Tensor | None, target: Tensor | None, tokens: int) -> Tensor:
    """For each of the `tokens` that entered, the position of the leaving one that it is in, or -1: [B, tokens]."""
    batch, count = kept.shape
    out = torch.full((batch, tokens), -1, dtype=torch.long, device=kept.device)
    out = out.scatter(1, kept, positions(count, kept).expand(batch, -1))
    return out if moved is None or target is None else out.scatter(1, moved, target)
