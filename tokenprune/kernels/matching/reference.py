"""Naive cosine matching: reads like the formula."""

import torch
from torch import Tensor


def cosine_match(a: Tensor, b: Tensor, *, window: int | None = None) -> tuple[Tensor, Tensor]:
    """For each row of a [B, M, D] the largest cosine similarity with a row of b [B, N, D], and the lowest such row;
    with a window only rows at most that far from floor(i N / M)."""
    batch, rows, _ = a.shape
    others = b.shape[1]
    values = torch.empty(batch, rows, dtype=a.dtype)
    indices = torch.empty(batch, rows, dtype=torch.long)
    for i in range(batch):
        for j in range(rows):
            near = [c for c in range(others) if window is None or abs(c - j * others // rows) <= window]
            cosines = [a[i, j] @ b[i, c] / (a[i, j].norm() * b[i, c].norm()).clamp_min(1e-12) for c in near]
            values[i, j] = max(cosines)
            indices[i, j] = min(c for c, cosine in zip(near, cosines, strict=True) if cosine == max(cosines))
    return values, indices
