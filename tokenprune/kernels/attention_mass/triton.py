"""Attention mass in Triton, matrix-free: the log-sum-exp of every row once, then one recomputed q kᵀ an iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.attention_mass.iterate import iterate
from tokenprune.kernels.inputs import additive
from tokenprune.kernels.launch import INTERPRETED, bucket, inner_contiguous, on_device, padded_dim, tuned_product

KEY = ["row_bucket", "key_bucket", "BLOCK_D", "BIAS"]


def _extra(options: dict[str, Any]) -> int:
    return 128 if options["BIAS"] == 2 else 0


@triton.jit
def _rows(pointer, start, row_stride, count, dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [BLOCK, BLOCK_D] from `start` on, zero behind the last row and the last dimension."""
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    place = row[:, None] * row_stride + d[None, :]  # 64 bits are for the block's start alone: they cost registers
    mask = (start + row < count)[:, None] & (d < dim)[None, :]
    rows = tl.load(pointer + tl.cast(start, tl.int64) * row_stride + place, mask=mask, other=0.0)
    return rows.to(tl.float32) if INTERPRETED else rows


@triton.jit
def _logits(
    q,
    k,
    scale,
    bias,
    first_row,
    first_key,
    rows,
    keys,
    bias_row,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Logits to base 2 [BLOCK_M, BLOCK_N], -inf behind the last key. BIAS: 0 none, 1 of keys, 2 of pairs."""
    log2_e = 1.4426950408889634
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * log2_e)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first_key + n < keys
    bias += tl.cast(first_key, tl.int64)
    if BIAS == 1:
        logits += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :] * log2_e
    if BIAS == 2:
        place = m[:, None] * bias_row + n[None, :]
        mask = (first_row + m < rows)[:, None] & inside[None, :]
        added = tl.load(bias + tl.cast(first_row, tl.int64) * bias_row + place, mask=mask, other=0.0)
        logits += added.to(tl.float32) * log2_e
    return tl.where(inside[None, :], logits, float("-inf"))


@tuned_product(KEY, _extra)
@triton.jit
def log_sum_exp_kernel(
    q,
    k,
    bias,
    out,
    scale,
    heads,
    rows,
    keys,
    dim,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    bias_image,
    bias_head,
    bias_row,
    row_bucket,
    key_bucket,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [B, H, M]: log-sum-exp to base 2 of each row of logits; +inf where a query may attend to nothing."""
    blocks = tl.cdiv(rows, BLOCK_M)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_M
    image, head = pair // heads, pair % heads
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    bias += image * bias_image + head * bias_head
    m = start + tl.arange(0, BLOCK_M)
    queries = _rows(q, start, q_row, rows, dim, BLOCK_M, BLOCK_D)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, keys, BLOCK_N):
        some = _rows(k, first, k_row, keys, dim, BLOCK_N, BLOCK_D)
        logits = _logits(
            queries, some, scale, bias, start, first, rows, keys, bias_row, BIAS, PRECISION, BLOCK_M, BLOCK_N
        )
        new = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        largest = new
    result = tl.where(total == 0.0, float("inf"), largest + tl.log2(total))
    tl.store(out + pair * rows + m, result, mask=m < rows)


@tuned_product(KEY, _extra)
@triton.jit
def push_kernel(
    q,
    k,
    bias,
    log_sum_exp,
    weights,
    out,
    scale,
    heads,
    rows,
    keys,
    dim,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    bias_image,
    bias_head,
    bias_row,
    row_bucket,
    key_bucket,
    BLOCK_D: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [B, H, N]: the sum over queries of weights [B, H, M] times attention; each program sums for its own keys."""
    blocks = tl.cdiv(keys, BLOCK_N)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_N
    image, head = pair // heads, pair % heads
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    bias += image * bias_image + head * bias_head
    n = start + tl.arange(0, BLOCK_N)
    some = _rows(k, start, k_row, keys, dim, BLOCK_N, BLOCK_D)
    # Summed over the block's rows at the end alone: a sum across warps in each turn would need a barrier.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, rows, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        queries = _rows(q, first, q_row, rows, dim, BLOCK_M, BLOCK_D)
        logits = _logits(
            queries, some, scale, bias, first, start, rows, keys, bias_row, BIAS, PRECISION, BLOCK_M, BLOCK_N
        )
        normaliser = tl.load(log_sum_exp + pair * rows + m, mask=m < rows, other=float("inf"))
        weight = tl.load(weights + pair * rows + m, mask=m < rows, other=0.0)
        total += tl.exp2(logits - normaliser[:, None]) * weight[:, None]
    tl.store(out + pair * keys + n, tl.sum(total, 0), mask=n < keys)


def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    log_sums: Tensor | None = None,
) -> Tensor:
    """As `tokenprune.kernels.attention_mass.eager` without a memory limit: O(N) beside the inputs."""
    q, k = inner_contiguous(q), inner_contiguous(k)
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    mode = 0
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = inner_contiguous(additive(bias))
        mode = 1 if bias.shape[2] == 1 else 2
        strides = tuple(0 if size == 1 else stride for size, stride in zip(bias.shape[:3], bias.stride(), strict=False))
    sizes = (scale, heads, rows, keys, dim, *q.stride()[:3], *k.stride()[:3], *strides)
    options: dict[str, Any] = {
        "row_bucket": bucket(rows),
        "key_bucket": bucket(keys),
        "BLOCK_D": padded_dim(dim),
        "BIAS": mode,
        # A product of float32 in tf32 alone would err a thousand times more than torch's.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    log_sum_exp = q.new_empty(batch, heads, rows, dtype=torch.float32)
    bias = q if bias is None else bias  # any pointer: it is not read

    def push(mass: Tensor) -> Tensor:
        out = q.new_empty(batch, heads, keys, dtype=torch.float32)
        grid = lambda meta: (batch * heads * triton.cdiv(keys, meta["BLOCK_N"]),)  # noqa: E731
        push_kernel[grid](q, k, bias, log_sum_exp, mass, out, *sizes, **options)
        return out

    with on_device(q):
        grid = lambda meta: (batch * heads * triton.cdiv(rows, meta["BLOCK_M"]),)  # noqa: E731
        log_sum_exp_kernel[grid](q, k, bias, log_sum_exp, *sizes, **options)
        if log_sums is not None:
            torch.mul(log_sum_exp, math.log(2.0), out=log_sums)
        return torch.stack(iterate(push, weights.float().contiguous(), counts, tolerance))
