"""Fréchet distance between two sets of features, with intervals over the seeds that generated one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval


@dataclass(frozen=True)
class Gaussian:
    """mean: [D] and covariance: [D, D] of features, in double precision."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Mean and unbiased covariance of `features` [N, D]; weights: [N], how often each counts.

    Raises TokenPruneError for fewer than two features, and for features that are NaN or infinite.
    """
    data = features.double()
    lost = int((~data.isfinite()).any(-1).sum())
    if lost:
        raise TokenPruneError(
            f"the features of {lost} of {len(data)} images are NaN or infinite, which have no distance"
        )
    counts = torch.ones(len(data), dtype=torch.float64) if weights is None else weights.double()
    total = counts.sum()
    if total < 2:
        raise TokenPruneError(f"a covariance needs at least two images, got {int(total)}")
    mean = counts @ data / total
    centred = data - mean
    return Gaussian(mean, (centred * counts[:, None]).T @ centred / (total - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)) (Heusel et al., 2017, equation 6).

    This is the squared distance, as everyone reports it. Eigenvalues below zero are rounding and count as zero.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    difference = (first.mean - second.mean).square().sum()
    return float(difference + first.covariance.trace() + second.covariance.trace() - 2 * cross)


def bootstrap_frechet(
    generated: Tensor, real: Gaussian, *, seed: int = 0, resamples: int = 200, level: float = 0.95
) -> tuple[Interval, Tensor]:
    """Distance of `generated` [N, D] to `real` with a percentile interval, and the resampled distances [resamples].

    Image i of every set is drawn equally often in resample j, so that for sets made from the same seeds the difference
    of their resampled distances is that of a paired bootstrap. A resample repeats images, which narrows its covariance:
    the interval is shifted so that the mean of the resamples lies on the estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(generated)
    estimate = frechet_distance(gaussian(generated), real)
    draws = []
    for _ in range(resamples):
        weights = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        draws.append(frechet_distance(gaussian(generated, weights), real))
    distances = torch.tensor(draws, dtype=torch.float64)
    distances += estimate - distances.mean()
    return interval(estimate, distances, level), distances


def interval(estimate: float, draws: Tensor, level: float = 0.95) -> Interval:
    """`estimate` between the percentiles of `draws` [resamples]."""
    tail = (1.0 - level) / 2.0
    low, high = draws.quantile(torch.tensor([tail, 1.0 - tail], dtype=draws.dtype)).tolist()
    return Interval(estimate, low, high)
