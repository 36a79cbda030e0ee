"""Correlation coefficients of samples along the last dimension, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Of `first` and `second` [..., n]: [...], NaN where either does not vary or fewer than two values are there."""
    first, second = (values.double() for values in (first, second))
    first, second = (values - values.mean(-1, keepdim=True) for values in (first, second))
    scale = first.square().sum(-1).sqrt() * second.square().sum(-1).sqrt()
    # What rounding leaves of values that are all equal is no variation.
    varies = [values.amax(-1) - values.amin(-1) > 1e-12 * values.abs().amax(-1) for values in (first, second)]
    return torch.where(varies[0] & varies[1], (first * second).sum(-1) / scale, torch.nan).clamp(-1, 1)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's coefficient of the ranks of `first` and `second` [..., n], the mean rank for equal values: [...].

    Values that agree to 12 decimals are equal, here and for `kendall`.
    """
    return pearson(_ranks(first), _ranks(second))


def kendall(first: Tensor, second: Tensor) -> float:
    """Kendall's tau b of `first` and `second` [n]; NaN as for `pearson`."""
    from scipy.stats import kendalltau

    return float(kendalltau(_rounded(first).numpy(), _rounded(second).numpy()).statistic)


def _ranks(values: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(_rounded(values).numpy(), axis=-1))


def _rounded(values: Tensor) -> Tensor:
    """Values that only the order of a sum tells apart are equal."""
    return values.double().cpu().round(decimals=12)
