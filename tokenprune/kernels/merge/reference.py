"""Naive gathering and merging: one image and one token after another."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Entries `index` [B, K] of x [B, ..., N, ...] along `dim`."""
    images = zip(x, index, strict=True)
    return torch.stack([torch.stack([own.select(dim - 1, i) for i in row], dim - 1) for own, row in images])


def merge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Each kept token of x [B, n, C] averaged by size with the moved ones whose target it is, and the sums of sizes."""
    values, totals = [], []
    for image in range(x.shape[0]):
        for place in range(kept.shape[1]):
            group = [kept[image, place], *moved[image][target[image] == place]]
            own = sizes[image, group]
            total = own.sum()
            values.append((own[:, None] * x[image, group]).sum(0) / total)
            totals.append(total)
    return torch.stack(values).reshape(*kept.shape, -1), torch.stack(totals).reshape(kept.shape)


def unmerge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor) -> Tensor:
    """To each token of [B, n, C] the row of x [B, K, C] that it is in."""
    out = x.new_empty(x.shape[0], kept.shape[1] + moved.shape[1], x.shape[2])
    for image in range(x.shape[0]):
        for place in range(kept.shape[1]):
            out[image, kept[image, place]] = x[image, place]
        for token, place in zip(moved[image], target[image], strict=True):
            out[image, token] = x[image, place]
    return out
