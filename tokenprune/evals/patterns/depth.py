"""How deep each place of the grid is computed, and how far two such maps differ.

Haurum et al., "Which Tokens to Use?", 2023, section 4.3: the depth of a token averaged over a data set, at each place;
the measures are those by which saliency maps are compared (Bylinskii et al., TPAMI 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor


def survival(depth: Tensor, blocks: int) -> Tensor:
    """Share of the images in which the token of each place leaves each block: [blocks, N].

    depth: [I, N], of how many blocks in a row from the first the token of each patch leaves, `blocks` for all.
    """
    return torch.stack([(depth > block).double().mean(0) for block in range(blocks)])


def kl(first: Tensor, second: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the map `first` from `second` in bits: [..., N] to [...].

    Maps need not sum to 1, here and below: each is divided by its sum. Infinite where `second` is 0 and `first` is not.
    """
    first, second = _distribution(first), _distribution(second)
    return (torch.xlogy(first, first) - torch.xlogy(first, second)).sum(-1) / torch.log(torch.tensor(2.0).double())


def js(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits, in [0, 1]: the mean divergence of both maps from their mean."""
    first, second = _distribution(first), _distribution(second)
    mean = (first + second) / 2
    return (kl(first, mean) + kl(second, mean)) / 2


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Histogram intersection (SIM) in [0, 1]: each map goes from its least to its greatest value, sums to 1, and what
    both have is summed up. NaN where a map is constant."""
    spread = [values.double() - values.double().amin(-1, keepdim=True) for values in (first, second)]
    return torch.minimum(_distribution(spread[0]), _distribution(spread[1])).sum(-1)


def emd(first: Tensor, second: Tensor, grid: tuple[int, int]) -> float:
    """Earth mover's distance of two maps [N] on `grid` (rows, columns), in patches.

    The least sum of mass times Euclidean distance that turns one map into the other, each of mass 1, by linear
    programming. As a distance obeys the triangle inequality, what both have at a place stays there.
    """
    import numpy
    from scipy.optimize import linprog
    from scipy.sparse import eye, kron, vstack

    surplus = _distribution(first.cpu()) - _distribution(second.cpu())
    places = torch.cartesian_prod(*(torch.arange(size).double() for size in grid))
    sources, sinks = surplus > 0, surplus < 0
    if not (sources.any() and sinks.any()):
        return 0.0
    distance = torch.cdist(places[sources], places[sinks])
    rows, columns = distance.shape
    sums = vstack([kron(eye(rows), numpy.ones((1, columns))), kron(numpy.ones((1, rows)), eye(columns))], format="csr")
    supply, demand = surplus[sources], -surplus[sinks]
    demand = demand * (supply.sum() / demand.sum())  # equal to the last bit, or nothing is feasible
    # One of the sums follows from the others.
    masses = torch.cat([supply, demand])[:-1]
    found = linprog(distance.flatten().numpy(), A_eq=sums[:-1], b_eq=masses.numpy(), method="highs")
    return float(found.fun)


def _distribution(values: Tensor) -> Tensor:
    values = values.double()
    return values / values.sum(-1, keepdim=True)
