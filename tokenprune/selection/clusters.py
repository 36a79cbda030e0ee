"""Hard clusterings of the tokens of an image, on Euclidean distances that are computed some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.merge import gather
from tokenprune.kernels.pairwise import density, nearest, spread
from tokenprune.ordering import order_of
from tokenprune.reduction import Reduction
from tokenprune.selection.top_k import ranked


def assign(x: Tensor, centres: Tensor) -> Tensor:
    """The place [B, n] among the centres [B, K], positions ascending, of the one nearest to each token of x [B, n, C],
    ties to the lower; a centre belongs to itself."""
    found = nearest(x, gather(x, centres), metric="euclidean")[1]
    return found.scatter(1, centres, torch.arange(centres.shape[1], device=x.device).expand_as(centres))


def medoids(x: Tensor, weights: Tensor, count: int, iterations: int) -> Tensor:
    """`count` tokens of x [B, n, C], as [B, count] positions, ascending: medoids of clusters (Marin et al., "Token
    Pooling in Vision Transformers", WACV 2023, section 3.3).

    The first are the tokens of highest weight [B, n]; in each iteration every token joins its nearest medoid, and of a
    cluster the token with the least sum of distances to its members, times their weights, is its next medoid. Ties go
    to the lower position.
    """
    chosen = ranked(weights)[:, :count].sort(dim=1).values
    for _ in range(iterations):
        cluster = assign(x, chosen)
        cost = spread(x, weights, cluster)
        least = torch.full_like(chosen, torch.inf, dtype=cost.dtype).scatter_reduce(1, cluster, cost, "amin")
        place = torch.arange(x.shape[1], device=x.device).expand_as(cluster)
        best = torch.where(cost == gather(least, cluster), place, x.shape[1])
        found = torch.full_like(chosen, x.shape[1]).scatter_reduce(1, cluster, best, "amin")
        chosen = torch.where(found < x.shape[1], found, chosen).sort(dim=1).values  # an image of NaN has no least
    return chosen


def density_peaks(x: Tensor, count: int, neighbours: int) -> Tensor:
    """`count` tokens of x [B, n, C], as [B, count] positions, ascending: those of the highest density times distance to
    the nearest denser token (DPC-KNN, Du et al., 2016).

    The density is that of the `neighbours` nearest tokens, of which a token is itself one; of two equally dense tokens
    the lower is the denser one, where published code adds noise. The densest of all is always chosen.
    """
    dense = density(x, count=neighbours)
    order = ranked(dense)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
    apart = -nearest(x, x, metric="euclidean", ranks=(rank, rank))[0]
    return ranked(dense * apart)[:, :count].sort(dim=1).values


def merge_clusters(x: Tensor, centres: Tensor) -> Reduction:
    """Merge each token of x [B, n, C] into the nearest of the centres [B, K], all of a cluster with equal weights."""
    cluster = assign(x, centres)
    gone = x.shape[1] - centres.shape[1]
    left = torch.zeros_like(cluster, dtype=torch.int8).scatter(1, centres, 1)
    moved = order_of(left)[:, :gone]
    return Reduction(centres, moved, gather(cluster, moved), average="equal")
