"""Sums and extremes over all pairs of tokens, without the matrix of pairs: what clusterings and energies are made of.

Each is one opaque operator, so that torch.compile sees a single node, whatever the batch. A match by cosine alone is
`tokenprune.kernels.matching`, which is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.inputs import at_once, exporting, observed, precision, without_autocast
from tokenprune.kernels.pairwise import eager
from tokenprune.kernels.pairwise.eager import METRICS

__all__ = ["METRICS", "density", "energy", "nearest", "neighbours", "spread"]


def nearest(
    a: Tensor,
    b: Tensor,
    *,
    metric: str,
    ranks: tuple[Tensor, Tensor] | None = None,
    memory_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest row of b [B, N, D] for each row of a [B, M, D], ties to the lower row.

    metric: one of METRICS. ranks: [B, M] and [B, N]; a row of a then looks only at rows of b whose rank is lower, such
    as tokens that are more important. memory_limit: bytes of the matrix of pairs to hold at a time (64 MiB, on a GPU
    512 MiB); at least one row's, and rather what fits the cache; so it is everywhere here. No gradient anywhere here:
    tokens are only chosen.

    Returns the closeness [B, M] (a cosine, a product, or minus a distance; -inf where no row of b is looked at) in
    float32, float64 for float64 inputs, and the row [B, M]. NaN gives NaN and a valid row.

    Raises:
        TokenPruneError: an unknown metric, shapes that do not fit, or no rows in b.
    """
    if metric not in METRICS:
        raise TokenPruneError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    _check(a, b)
    own, other = ranks if ranks is not None else (None, None)
    found: tuple[Tensor, Tensor] = _call("nearest", eager.nearest, (a, b), metric, own, other, memory_limit)
    return found


def energy(x: Tensor, *, margin: float, memory_limit: int | None = None) -> Tensor:
    """Mean over all tokens j of elu(cos(x_i, x_j) - margin): high in a large group of similar tokens. x: [B, n, D];
    returns [B, n] (PiToMe, Tran et al., NeurIPS 2024, equation 4)."""
    found: Tensor = _call("energy", eager.energy, (x,), margin, memory_limit)
    return found


def neighbours(
    a: Tensor, b: Tensor, *, threshold: float, memory_limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of a [B, M, D]: how many rows of b [B, N, D] have a cosine of at least `threshold` with it, the mean
    cosine with those (0 of none), and the mean with all; three of [B, M] (SAINT, Jeddi et al., 2025).

    Raises:
        TokenPruneError: shapes that do not fit, or no rows in b.
    """
    _check(a, b)
    found: tuple[Tensor, Tensor, Tensor] = _call("neighbours", eager.neighbours, (a, b), threshold, memory_limit)
    return found


def density(x: Tensor, *, count: int, memory_limit: int | None = None) -> Tensor:
    """exp(- mean of the `count` smallest squared distances / D), a token's own, 0, among them. x: [B, n, D]; returns
    [B, n] (DPC-KNN, Du et al., 2016)."""
    found: Tensor = _call("density", eager.density, (x,), count, memory_limit)
    return found


def spread(x: Tensor, weights: Tensor, cluster: Tensor, *, memory_limit: int | None = None) -> Tensor:
    """Sum over the tokens j of the cluster of i of weights_j times the Euclidean distance of i and j: lowest at a
    cluster's medoid. x: [B, n, D], weights: [B, n], cluster: [B, n] whole numbers; returns [B, n]."""
    found: Tensor = _call("spread", eager.spread, (x, weights, cluster), memory_limit)
    return found


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or b.shape != (a.shape[0], b.shape[1], a.shape[2]) or b.shape[1] == 0:
        raise TokenPruneError(
            f"a {list(a.shape)} and b {list(b.shape)} do not fit; they are [B, M, D] and [B, N, D], N > 0"
        )


def _call(name: str, function: Callable[..., Any], tensors: tuple[Tensor, ...], *options: Any) -> Any:
    tensors, chosen, limit = tuple(x.detach() for x in tensors), options[:-1], options[-1]
    if exporting():  # all rows at once, as their number is not known, by torch's own operators
        return function(*tensors, *chosen, None)
    options = (*chosen, at_once(tensors[0].device, limit))
    if observed(*tensors):
        return getattr(torch.ops.tokenprune, f"pairwise_{name}")(*tensors, *options)
    with without_autocast(tensors[0]):
        return function(*tensors, *options)


def _operator(function: Callable[..., Any], outputs: int, *, index: bool = False) -> None:
    """Register `function` of eager as an operator with `outputs` results [B, M], the last one rows where `index`."""

    def run(*args: Any) -> Any:
        with without_autocast(args[0]):
            return function(*args)

    def fake(a: Tensor, *args: Any) -> Any:
        made = [a.new_empty(a.shape[:2], dtype=precision(a)) for _ in range(outputs)]
        if index:
            made[-1] = a.new_empty(a.shape[:2], dtype=torch.long)
        return made[0] if outputs == 1 else tuple(made)

    name = f"tokenprune::pairwise_{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    operator = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    packet = getattr(torch.ops.tokenprune, f"pairwise_{function.__name__}")
    register_flop_formula(packet)(_flops)


def _flops(a: tuple[int, ...], *args: object, **kwargs: object) -> int:
    """Of the products; the distances that are none count as one."""
    others = args[0] if args and isinstance(args[0], (tuple, torch.Size)) and len(args[0]) == 3 else a
    batch, rows, dim = a
    return 2 * batch * rows * others[1] * dim


_operator(eager.nearest, 2, index=True)
_operator(eager.energy, 1)
_operator(eager.neighbours, 3)
_operator(eager.density, 1)
_operator(eager.spread, 1)
