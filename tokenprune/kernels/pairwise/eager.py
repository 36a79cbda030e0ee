"""Sums over pairs in plain torch, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.kernels import inputs
from tokenprune.kernels.inputs import precision

# Orders of the distances that are no product.
ORDERS = {"manhattan": 1.0, "minkowski_3": 3.0, "minkowski_4": 4.0, "minkowski_5": 5.0, "chebyshev": math.inf}
METRICS = ("cosine", "dot", "euclidean", *ORDERS)


def blocks(a: Tensor, b: Tensor, limit: int | None) -> Iterator[slice]:
    """Rows of a [B, M, D] whose pairs with all of b [B, N, D] take `limit` bytes or less, but at least one row; all
    without a limit."""
    batch, rows = a.shape[:2]
    block = rows
    if limit is not None:
        work = min(limit, inputs.CACHED * torch.get_num_threads()) if a.device.type == "cpu" else limit
        block = max(1, work // max(1, batch * b.shape[1] * precision(a).itemsize))
    for start in range(0, max(rows, 1), max(block, 1)):
        yield slice(start, min(rows, start + block))


def closeness(a: Tensor, b: Tensor, metric: str) -> Callable[[slice], Tensor]:
    """A function from rows of a [B, M, D] to how near each is to the rows of b [B, N, D], [B, rows, N]."""
    a, b = a.to(precision(a)), b.to(precision(b))
    if metric in ORDERS:
        return lambda rows: -torch.cdist(a[:, rows], b, p=ORDERS[metric])
    if metric == "cosine":
        a, b = F.normalize(a, dim=-1, eps=1e-12), F.normalize(b, dim=-1, eps=1e-12)
    if metric != "euclidean":
        return lambda rows: torch.bmm(a[:, rows], b.transpose(1, 2))
    middle = b.mean(1, keepdim=True)  # squares of what all have in common would drown the differences
    a, b = a - middle, b - middle
    squares = b.square().sum(-1).unsqueeze(1)

    def distance(rows: slice) -> Tensor:
        some = a[:, rows]
        products = torch.bmm(some, b.transpose(1, 2))
        return -(some.square().sum(-1, keepdim=True) + squares - 2 * products).clamp_min(0).sqrt()

    return distance


def distances(x: Tensor) -> Callable[[slice], Tensor]:
    """A function from rows of x [B, n, D] to their Euclidean distances to all of x, [B, rows, n], to themselves 0."""
    near, own = closeness(x, x, "euclidean"), torch.arange(x.shape[1], device=x.device)
    return lambda rows: -near(rows).masked_fill(own[rows].unsqueeze(1) == own, 0.0)


def nearest(
    a: Tensor, b: Tensor, metric: str, a_rank: Tensor | None, b_rank: Tensor | None, limit: int | None
) -> tuple[Tensor, Tensor]:
    """Closeness [B, M] and row [B, M] of the nearest row of b, where ranks are given among those of lower rank."""
    near, values, indices = closeness(a, b, metric), [], []
    for rows in blocks(a, b, limit):
        found = near(rows)
        if a_rank is not None and b_rank is not None:
            found = found.masked_fill(b_rank.unsqueeze(1) >= a_rank[:, rows].unsqueeze(2), float("-inf"))
        value, index = found.max(-1)  # of equals the first, as torch documents it
        values.append(value)
        indices.append(index)
    return torch.cat(values, 1), torch.cat(indices, 1)


def energy(x: Tensor, margin: float, limit: int | None) -> Tensor:
    """[B, n]."""
    near = closeness(x, x, "cosine")
    return torch.cat([F.elu(near(rows) - margin).mean(-1) for rows in blocks(x, x, limit)], 1)


def neighbours(a: Tensor, b: Tensor, threshold: float, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Three of [B, M]."""
    near, found = closeness(a, b, "cosine"), []
    for rows in blocks(a, b, limit):
        cosines = near(rows)
        above = cosines >= threshold
        count = above.sum(-1).to(cosines.dtype)
        found.append((count, (cosines * above).sum(-1) / count.clamp_min(1), cosines.mean(-1)))
    count, mean, every = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return count, mean, every


def density(x: Tensor, count: int, limit: int | None) -> Tensor:
    """[B, n]."""
    apart, count, out = distances(x), min(count, x.shape[1]), []
    for rows in blocks(x, x, limit):
        squares = apart(rows).topk(count, dim=-1, largest=False, sorted=False).values.square()
        out.append((-squares.mean(-1) / x.shape[2]).exp())
    return torch.cat(out, 1)


def spread(x: Tensor, weights: Tensor, cluster: Tensor, limit: int | None) -> Tensor:
    """[B, n]."""
    apart, weights, out = distances(x), weights.to(precision(x)).unsqueeze(1), []
    for rows in blocks(x, x, limit):
        together = cluster[:, rows].unsqueeze(2) == cluster.unsqueeze(1)
        out.append((apart(rows) * together * weights).sum(-1))
    return torch.cat(out, 1)
