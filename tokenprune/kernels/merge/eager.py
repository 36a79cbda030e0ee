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
    (batch, tokens, width), count = x.shape, kept.shape[1]
    rows, own, goal = flat_rows(kept, tokens), flat_rows(moved, tokens), flat_rows(target, count)
    # Whole rows, as in `gather`, and in place: memory that is new costs a CPU more than the arithmetic.
    flat = x.reshape(-1, width)
    dtype = torch.promote_types(x.dtype, torch.float32 if sizes is None else sizes.dtype)
    out, pull = flat.index_select(0, rows).to(dtype), flat.index_select(0, own).to(dtype)
    if sizes is None:  # a sum and a quotient, which leaves groups of one as they are
        merged = x.new_ones(batch * count, dtype=torch.float32)
        merged.scatter_add_(0, goal, merged.new_ones(goal.shape))
        out = out.index_add_(0, goal, pull).div_(merged.unsqueeze(-1))
    else:
        # x_t + sum of s_m / S (x_m - x_t) is the average of the group, and touches none but the rows that it changes.
        sizes = sizes.reshape(-1)
        added = sizes.index_select(0, own)
        merged = sizes.index_select(0, rows).scatter_add_(0, goal, added)
        share = added / merged.index_select(0, goal)
        pull = pull.sub_(out.index_select(0, goal)).mul_(share.unsqueeze(-1))
        out = out.index_add_(0, goal, pull)
    return out.to(x.dtype).view(batch, count, width), merged.view(batch, count)


def merge_sizes(sizes: Tensor, kept: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """The sizes [B, K] alone that `merge` gives: those of the kept tokens and of the moved ones added to theirs."""
    return gather(sizes, kept, 1).scatter_add(1, target, gather(sizes, moved, 1))


def source(kept: Tensor, moved: Tensor | None, target: Tensor | None, tokens: int) -> Tensor:
    """For each of the `tokens` that entered, the position of the leaving one that it is in, or -1: [B, tokens]."""
    batch, count = kept.shape
    out = torch.full((batch, tokens), -1, dtype=torch.long, device=kept.device)
    out = out.scatter(1, kept, positions(count, kept).expand(batch, -1))
    return out if moved is None or target is None else out.scatter(1, moved, target)
