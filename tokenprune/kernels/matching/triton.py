"""Cosine matching in Triton: the product's blocks are reduced where they are made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.inputs import EPSILON
from tokenprune.kernels.launch import INTERPRETED, bucket, inner_contiguous, on_device, padded_dim, tuned_product

LARGEST_DIM = 32  # at a time: longer rows are multiplied in parts


@tuned_product(["row_bucket", "other_bucket", "dim", "WINDOW"], lambda options: 64)
@triton.jit
def cosine_match_kernel(
    a,
    b,
    a_inverse,
    b_inverse,
    value,
    index,
    rows,
    others,
    dim,
    window,
    a_image,
    a_row,
    b_image,
    b_row,
    row_bucket,
    other_bucket,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """value, index [B, M]: the largest cosine of each row of a with the rows of b in its window (WINDOW: it has one),
    and the lowest such row; one over their norms [B, M] and [B, N] is given. NaN counts as the largest."""
    blocks = tl.cdiv(rows, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    low, high = 0, others
    if WINDOW:
        centre = (m.to(tl.int64) * others // rows).to(tl.int32)
        low = tl.maximum(0, start.to(tl.int64) * others // rows - window).to(tl.int32)
        last = tl.minimum(rows, start + BLOCK_M) - 1
        high = tl.minimum(others, last.to(tl.int64) * others // rows + window + 1).to(tl.int32)
    a += image * a_image
    b += image * b_image
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_M], tl.int32) + low
    for first in range(low, high, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for part in range(0, dim, BLOCK_D):
            d = part + tl.arange(0, BLOCK_D)
            x = tl.load(a + m[:, None] * a_row + d[None, :], mask=(m < rows)[:, None] & (d < dim)[None, :], other=0.0)
            y = tl.load(b + n[None, :] * b_row + d[:, None], mask=(n < others)[None, :] & (d < dim)[:, None], other=0.0)
            if INTERPRETED:
                x, y = x.to(tl.float32), y.to(tl.float32)
            dots = tl.dot(x, y, dots, input_precision=PRECISION)
        cosine = dots * tl.load(b_inverse + image * others + n, mask=n < others, other=0.0)[None, :]
        cosine = tl.where(cosine == cosine, cosine, float("inf"))
        seen = (n < others)[None, :]
        if WINDOW:
            seen &= tl.abs(n[None, :] - centre[:, None]) <= window
        cosine = tl.where(seen, cosine, float("-inf"))
        largest = tl.max(cosine, 1)
        lowest = tl.min(tl.where(cosine == largest[:, None], n[None, :], others), 1)
        where = tl.where(largest > best, lowest, where)
        best = tl.maximum(best, largest)
    inverse = tl.load(a_inverse + image * rows + m, mask=m < rows, other=0.0)
    best = tl.where(best == float("inf"), float("nan"), best * inverse)
    tl.store(value + image * rows + m, best, mask=m < rows)
    tl.store(index + image * rows + m, where.to(tl.int64), mask=m < rows)


def cosine_match(a: Tensor, b: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """a [B, M, D], b [B, N, D] -> similarity [B, M] in float32 and row of b [B, M]; window -1: every row is seen."""
    a, b = inner_contiguous(a), inner_contiguous(b)
    batch, rows, dim = a.shape
    others = b.shape[1]
    inverse = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp_min(EPSILON).reciprocal() for x in (a, b)]
    value = a.new_empty(batch, rows, dtype=torch.float32)
    index = torch.empty(batch, rows, dtype=torch.long, device=a.device)
    if value.numel() == 0:
        return value, index
    grid = lambda meta: (batch * triton.cdiv(rows, meta["BLOCK_M"]),)  # noqa: E731
    sizes = (rows, others, dim, window, *a.stride()[:2], *b.stride()[:2], bucket(rows), bucket(others))
    with on_device(a):
        cosine_match_kernel[grid](
            a,
            b,
            *inverse,
            value,
            index,
            *sizes,
            BLOCK_D=min(LARGEST_DIM, padded_dim(dim)),
            WINDOW=window >= 0,
            # A product of float32 in tf32 alone would err a thousand times more than torch's.
            PRECISION="tf32x3" if a.dtype == torch.float32 else "tf32",
        )
    return value, index
