"""Logits of a few queries in Triton: every key is read once, wherever it lies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.launch import autotuned, bucket, inner_contiguous, on_device, padded_dim

CONFIGS = [
    triton.Config({"BLOCK_N": 64}, num_warps=4),
    triton.Config({"BLOCK_N": 32}, num_warps=4),
    triton.Config({"BLOCK_N": 128}, num_warps=8),
]


@autotuned(CONFIGS, ["key_bucket", "few", "BLOCK_D"])
@triton.jit
def few_logits_kernel(
    q,
    k,
    out,
    scale,
    heads,
    few,
    keys,
    dim,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    key_bucket,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [B, H, R, N] = q kᵀ scale for q [B, H, R, D], in float32."""
    blocks = tl.cdiv(keys, BLOCK_N)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_D)
    place = image * k_image + head * k_head + n.to(tl.int64)[:, None] * k_row + d[None, :]
    mask = (n < keys)[:, None] & (d < dim)[None, :]
    some = tl.load(k + place, mask=mask, other=0.0).to(tl.float32)
    q += image * q_image + head * q_head
    for row in range(0, few):
        query = tl.load(q + row * q_row + d, mask=d < dim, other=0.0).to(tl.float32)
        logits = tl.sum(some * query[None, :], 1) * scale
        tl.store(out + (pair * few + row) * keys + n, logits, mask=n < keys)


def few_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q kᵀ scale for a few queries q [B, H, R, D] and keys [B, H, N, D]: [B, H, R, N] in float32."""
    q, k = inner_contiguous(q), inner_contiguous(k)
    batch, heads, few, dim = q.shape
    keys = k.shape[2]
    out = q.new_empty(batch, heads, few, keys, dtype=torch.float32)
    grid = lambda meta: (batch * heads * triton.cdiv(keys, meta["BLOCK_N"]),)  # noqa: E731
    sizes = (scale, heads, few, keys, dim, *q.stride()[:3], *k.stride()[:3], bucket(keys))
    with on_device(q):
        few_logits_kernel[grid](q, k, out, *sizes, BLOCK_D=padded_dim(dim))
    return out
