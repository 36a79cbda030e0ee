"""Naive cosine matching: reads like the formula."""

import torch
from torch import Tensor


def cosine_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a [B, M, D] the largest cosine similarity with a row of b [B, N, D], and the lowest such row."""
    batch, rows, _ = a.shape
    values = torch.empty(batch, rows, dtype=a.dtype)
    indices = torch.empty(batch, rows, dtype=torch.long)
    for i in range(batch):
        for j in range(rows):
            cosines = torch.stack([a[i, j] @ c / (a[i, j].norm() * c.norm()) for c in b[i]])
            values[i, j] = cosines.max()
            indices[i, j] = min(k for k in range(b.shape[1]) if cosines[k] == cosines.max())
    return values, indices
