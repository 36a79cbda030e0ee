"""How alike two sets of features of the same images are, whatever their basis.

All three are 1 for features that differ by a rotation, a shift and an isotropic scale. The distances of Ding et al.,
"Grounding Representation Similarity with Statistical Testing", NeurIPS 2021, by which "Which Tokens to Use?" compares
class tokens, are 1 - `linear_cka`, 1 - `pwcca` and 2 - 2 `procrustes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError

NOISE = 1e-10
"""Share of the largest variance below which a direction has none."""


def linear_cka(first: Tensor, second: Tensor, weights: Tensor | None = None) -> float:
    """Linear centred kernel alignment in [0, 1] (Kornblith et al., ICML 2019, equation 1, in feature space).

    first, second: features [I, D1] and [I, D2] of the same I images. weights: [I], how often each image counts, here
    and below. NaN where all images have equal features.
    """
    first, second = _centred(first, weights), _centred(second, weights)
    own = torch.linalg.matrix_norm(first.T @ first) * torch.linalg.matrix_norm(second.T @ second)
    return float(torch.linalg.matrix_norm(first.T @ second).square() / own)


def procrustes(first: Tensor, second: Tensor, weights: Tensor | None = None) -> float:
    """Procrustes similarity in [0, 1]: the nuclear norm of first^T second, both centred and of Frobenius norm 1.

    It is the greatest sum of inner products that a rotation of one can reach; the squared distance that is left is
    2 - 2 times it.
    """
    first, second = _centred(first, weights), _centred(second, weights)
    return float(torch.linalg.svdvals(first.T @ second).sum()) if bool(first.isfinite().all()) else float("nan")


def pwcca(first: Tensor, second: Tensor, weights: Tensor | None = None) -> float:
    """Projection-weighted canonical correlation in [0, 1] (Morcos et al., NeurIPS 2018, section 3).

    The canonical correlations, each weighted by how much of `first` its direction accounts for; not symmetric. An
    invertible linear map of `second` changes nothing.

    Raises TokenPruneError for no more images than channels: everything correlates perfectly then.
    """
    least = max(first.shape[1], second.shape[1]) + 1
    if len(first) < least:
        raise TokenPruneError(
            f"pwcca of {first.shape[1]} and {second.shape[1]} channels needs more images than channels, and"
            f" {len(first)} are too few; take {least} or, better, several times as many"
        )
    first, second = _centred(first, weights), _centred(second, weights)
    if not (bool(first.isfinite().all()) and bool(second.isfinite().all())):
        return float("nan")
    basis = _whitened(first)
    directions, correlations, _ = torch.linalg.svd(basis.T @ _whitened(second), full_matrices=False)
    importance = (directions.T @ (basis.T @ first)).abs().sum(1)
    return float((importance * correlations.clamp(max=1)).sum() / importance.sum())


def _centred(features: Tensor, weights: Tensor | None) -> Tensor:
    """Of mean 0 and Frobenius norm 1, each row times the root of its weight."""
    features = features.double()
    if weights is None:
        features = features - features.mean(0)
    else:
        weights = weights.double()[:, None]
        features = (features - (weights * features).sum(0) / weights.sum()) * weights.sqrt()
    centred: Tensor = features / torch.linalg.matrix_norm(features)
    return centred


def _whitened(features: Tensor) -> Tensor:
    """An orthonormal basis [I, R] of what the columns of `features` [I, D] span."""
    variances, directions = torch.linalg.eigh(features.T @ features)
    real = variances > NOISE * variances[-1]
    basis: Tensor = features @ (directions[:, real] * variances[real].rsqrt())
    return basis
