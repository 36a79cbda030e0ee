"""Naive sums over pairs: one token after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def closeness(a: Tensor, b: Tensor, metric: str) -> float:
    """How near two rows [D] are, the more the nearer: a cosine, a product, or minus a distance."""
    if metric == "dot":
        return float(a @ b)
    if metric == "cosine":
        return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-12))
    order = {"manhattan": 1.0, "euclidean": 2.0, "chebyshev": math.inf}.get(metric) or float(metric.rpartition("_")[2])
    return -float((a - b).norm(p=order))


def nearest(a: Tensor, b: Tensor, *, metric: str, ranks: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """For each row of a [B, M, D] the largest closeness to a row of b [B, N, D], and the first such row; with ranks
    ([B, M], [B, N]) only rows of b of lower rank count, -inf and 0 where there is none."""
    values = a.new_full(a.shape[:2], -math.inf)
    rows = torch.zeros(a.shape[:2], dtype=torch.long)
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            for c in range(b.shape[1]):
                if ranks is not None and not ranks[1][i, c] < ranks[0][i, j]:
                    continue
                found = closeness(a[i, j], b[i, c], metric)
                if found > values[i, j]:
                    values[i, j], rows[i, j] = found, c
    return values, rows


def energy(x: Tensor, *, margin: float) -> Tensor:
    """Mean over all tokens j of elu(cos(x_i, x_j) - margin), [B, n]."""
    out = x.new_zeros(x.shape[:2])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            over = [closeness(x[i, j], other, "cosine") - margin for other in x[i]]
            out[i, j] = sum(v if v > 0 else math.exp(v) - 1 for v in over) / len(over)
    return out


def neighbours(a: Tensor, b: Tensor, *, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a [B, M, D]: how many rows of b [B, N, D] have at least that cosine with it, the mean cosine with
    those (0 of none), and with all."""
    count, near, every = (a.new_zeros(a.shape[:2]) for _ in range(3))
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            cosines = [closeness(a[i, j], other, "cosine") for other in b[i]]
            above = [c for c in cosines if c >= threshold]
            count[i, j] = len(above)
            near[i, j] = sum(above) / max(1, len(above))
            every[i, j] = sum(cosines) / len(cosines)
    return count, near, every


def density(x: Tensor, *, count: int) -> Tensor:
    """exp(- mean of the `count` smallest squared distances / D), a token's own, 0, among them, [B, n]."""
    out = x.new_zeros(x.shape[:2])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            squares = sorted(closeness(x[i, j], other, "euclidean") ** 2 for other in x[i])[:count]
            out[i, j] = math.exp(-sum(squares) / len(squares) / x.shape[2])
    return out


def spread(x: Tensor, weights: Tensor, cluster: Tensor) -> Tensor:
    """Sum over the tokens j of i's cluster of weights_j times the distance of i and j, [B, n]."""
    out = x.new_zeros(x.shape[:2])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            for other in range(x.shape[1]):
                if cluster[i, other] == cluster[i, j]:
                    out[i, j] += weights[i, other] * -closeness(x[i, j], x[i, other], "euclidean")
    return out
