"""Attention mass of fewer queries: one for each window of the grid, pooled or sampled."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.attention_mass import attention_mass


def probed_mass(
    record: AttentionRecord,
    weights: Tensor,
    *,
    window: tuple[int, int] = (2, 2),
    how: Literal["pool", "sample"] = "pool",
    iterations: int = 1,
) -> Tensor:
    """`attention_mass` of the record with one query for each window of the grid: [B, H, N].

    The tokens i of a window g share one row of attention, in which they pay what all of them hold:

        mass_j  <-  sum over g of (sum over i in g of mass_i) softmax_j(q_g k_jᵀ scale),    `iterations` times,

    q_g the mean of their queries ("pool") or the query of the one nearest the window's middle, by its original patch,
    ties to the first ("sample"). Prefix tokens are windows of their own. A window of h x w takes the time and the
    memory of 1 / (h w) of the exact mass an iteration, as the map is computed again in each; a window of (1, 1) is
    exact. How far it is from the exact mass: docs/kernels.md.

    weights: [B, H, N]. window: rows and columns of original patches.

    Raises:
        UnsupportedMethod: the patches fill no grid, or the attention has a bias, which is one of single queries.
    """
    if record.grid is None or record.bias is not None:
        what = "an attention bias" if record.grid is not None else "patches that fill no grid"
        raise UnsupportedMethod(f"windows of queries do not go with {what}; use attention_mass on all queries")
    q, k = record.rotated()
    group, groups = _windows(record, window)
    if how == "pool":
        members = _summed(torch.ones_like(weights[:, :1]), group, groups)
        probes = _summed(q.float().transpose(2, 3), group, groups).transpose(2, 3) / members.clamp_min(1).unsqueeze(-1)
    else:
        chosen = _middles(record, window, group, groups)
        probes = q.gather(2, chosen[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    mass = weights
    for _ in range(iterations):
        held = _summed(mass, group, groups)
        mass = attention_mass(probes.to(q.dtype), k, held, scale=record.scale)
    return mass


def _windows(record: AttentionRecord, window: tuple[int, int]) -> tuple[Tensor, int]:
    """The window of every token [B, N], and how many there are; some may be empty."""
    assert record.grid is not None
    rows, columns = (math.ceil(side / size) for side, size in zip(record.grid, window, strict=True))
    prefix, width = record.num_prefix_tokens, record.grid[1]
    row, column = record.origin // width // window[0], record.origin % width // window[1]
    own = torch.arange(prefix, device=record.origin.device).expand(record.origin.shape[0], -1)
    return torch.cat([own, prefix + row * columns + column], 1), prefix + rows * columns


def _middles(record: AttentionRecord, window: tuple[int, int], group: Tensor, groups: int) -> Tensor:
    """The token [B, G] nearest the middle of each window; of an empty one any, as it holds no mass."""
    assert record.grid is not None
    width, tokens = record.grid[1], group.shape[1]
    row, column = record.origin // width % window[0], record.origin % width % window[1]
    # Twice the distance, so that it is whole; the token's number breaks ties, and comes out again.
    off = (2 * row - window[0] + 1).abs() + (2 * column - window[1] + 1).abs()
    off = torch.cat([off.new_zeros(off.shape[0], record.num_prefix_tokens), off], 1)
    key = off * tokens + torch.arange(tokens, device=off.device)
    nearest = key.new_full((key.shape[0], groups), tokens * (2 * sum(window) + 1))
    return nearest.scatter_reduce(1, group, key, "amin") % tokens


def _summed(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums [B, ..., G] over the windows of x [B, ..., N]."""
    index = group.view(group.shape[0], *(1,) * (x.ndim - 2), -1).expand_as(x)
    return x.new_zeros(*x.shape[:-1], groups).scatter_add(-1, index, x)
