"""Gathering and merging in Triton: every row is read and written once, wherever it lies, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.launch import autotuned, bucket, inner_contiguous, on_device

GATHER_CONFIGS = [
    triton.Config({"BLOCK_K": 16, "BLOCK_C": 128}, num_warps=4),
    triton.Config({"BLOCK_K": 4, "BLOCK_C": 512}, num_warps=4),
    triton.Config({"BLOCK_K": 128, "BLOCK_C": 8}, num_warps=4),
]
MERGE_CONFIGS = [
    triton.Config({"BLOCK_C": 128}, num_warps=1),
    triton.Config({"BLOCK_C": 256}, num_warps=2),
    triton.Config({"BLOCK_C": 512}, num_warps=4),
]


@autotuned(GATHER_CONFIGS, ["count_bucket", "channels"])
@triton.jit
def gather_kernel(
    x,
    index,
    out,
    outer,
    count,
    channels,
    x_image,
    x_outer,
    x_token,
    x_channel,
    count_bucket,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [B, O, K, C] = the rows index [B, K] of x [B, O, N, C]."""
    blocks = tl.cdiv(count, BLOCK_K)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    image, row = pair // outer, pair % outer
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(index + image * count + k, mask=k < count, other=0).to(tl.int64)
    x += image * x_image + row * x_outer
    out += pair * count * channels
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = (k < count)[:, None] & (c < channels)[None, :]
        some = tl.load(x + token[:, None] * x_token + c[None, :] * x_channel, mask=mask)
        tl.store(out + k.to(tl.int64)[:, None] * channels + c[None, :], some, mask=mask)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """As `tokenprune.kernels.merge.eager.gather`, contiguous."""
    batch, count = index.shape
    out = x.new_empty(batch, *x.shape[1:dim], count, *x.shape[dim + 1 :])
    if out.numel() == 0:
        return out
    rows = x.flatten(dim + 1) if x.ndim > dim + 1 else x.unsqueeze(-1)
    rows = rows.flatten(1, dim - 1) if dim > 1 else rows.unsqueeze(1)
    image = 0 if x.shape[0] == 1 else rows.stride(0)
    outer, channels = rows.shape[1], rows.shape[3]
    grid = lambda meta: (batch * outer * triton.cdiv(count, meta["BLOCK_K"]),)  # noqa: E731
    sizes = (outer, count, channels, image, *rows.stride()[1:], bucket(count))
    with on_device(x):
        gather_kernel[grid](rows, index.contiguous(), out, *sizes)
    return out


@autotuned(MERGE_CONFIGS, ["channels"])
@triton.jit
def merge_kernel(
    x,
    sizes,
    kept,
    moved,
    first_moved,
    out,
    out_sizes,
    tokens,
    keep,
    moves,
    channels,
    x_image,
    x_token,
    BLOCK_C: tl.constexpr,
):
    """out [B, K, C]: the average by size of a kept row of x [B, n, C] and of the moved ones from first_moved [B, K + 1]
    to the next, where moved [B, M] is in the order of targets; out_sizes [B, K]: the sum of their sizes."""
    group = tl.program_id(0).to(tl.int64)
    image = group // keep
    x += image * x_image
    sizes += image * tokens
    moved += image * moves
    own = tl.load(kept + group).to(tl.int64)
    start = tl.load(first_moved + group + image)
    stop = tl.load(first_moved + group + image + 1)
    own_size = tl.load(sizes + own).to(tl.float32)
    total = own_size
    for i in range(start, stop):
        total += tl.load(sizes + tl.load(moved + i)).to(tl.float32)
    tl.store(out_sizes + group, total.to(out_sizes.dtype.element_ty))
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = c < channels
        sum = tl.load(x + own * x_token + c, mask=mask, other=0.0).to(tl.float32) * own_size
        for i in range(start, stop):
            token = tl.load(moved + i).to(tl.int64)
            some = tl.load(x + token * x_token + c, mask=mask, other=0.0).to(tl.float32)
            sum += some * tl.load(sizes + token).to(tl.float32)
        tl.store(out + group * channels + c, (sum / total).to(out.dtype.element_ty), mask=mask)


def merge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """As `tokenprune.kernels.merge.eager.merge`, each group summed in the order of `moved`."""
    x = inner_contiguous(x)
    batch, keep = kept.shape
    out, out_sizes = x.new_empty(batch, keep, x.shape[2]), sizes.new_empty(batch, keep)
    if out_sizes.numel() == 0:
        return out, out_sizes
    target, order = target.sort(dim=1, stable=True)
    bounds = torch.arange(keep + 1, device=x.device).expand(batch, -1).contiguous()
    first_moved = torch.searchsorted(target, bounds)
    lengths = (x.shape[1], keep, moved.shape[1], x.shape[2], *x.stride()[:2])
    parts = (x, sizes.contiguous(), kept.contiguous(), moved.gather(1, order), first_moved, out, out_sizes)
    with on_device(x):
        merge_kernel[(batch * keep,)](*parts, *lengths)
    return out, out_sizes
