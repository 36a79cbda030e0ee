"""Means and medians with bootstrap intervals, drawn by a generator of their own (the global RNG is never touched)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_mean(
    values: Tensor | Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Mean of `values` [n] with a percentile bootstrap interval.

    A sample in which every value is the same 0 or 1 would give an interval of width zero, which claims too much: there
    the exact (Clopper-Pearson) end for n equal answers is taken instead. An empty sample gives NaN thrice.
    """
    data = torch.as_tensor(values, dtype=torch.float64).cpu()
    interval = _bootstrap(data, lambda draws: draws.mean(dim=1), seed, resamples, level)
    if data.numel() and interval.low == interval.high and interval.estimate in (0.0, 1.0):
        reach = 1.0 - ((1.0 - level) / 2.0) ** (1.0 / data.numel())
        if interval.estimate == 1.0:
            return Interval(1.0, 1.0 - reach, 1.0)
        return Interval(0.0, 0.0, reach)
    return interval


def bootstrap_median(
    values: Tensor | Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Median of `values` [n] (mean of the two middle ones for even n) with a percentile bootstrap interval."""
    data = torch.as_tensor(values, dtype=torch.float64).cpu()
    return _bootstrap(data, lambda draws: draws.quantile(0.5, dim=1), seed, resamples, level)


def _bootstrap(
    data: Tensor, statistic: Callable[[Tensor], Tensor], seed: int, resamples: int, level: float
) -> Interval:
    if data.numel() == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.cat([statistic(data[index]) for index in _resample(data.numel(), resamples, generator)])
    tail = (1.0 - level) / 2.0
    low, high = draws.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(float(statistic(data[None])), low, high)


def _resample(size: int, resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors [rows, size], at most about four million draws at a time."""
    rows = max(1, 4_000_000 // size)
    for start in range(0, resamples, rows):
        yield torch.randint(size, (min(rows, resamples - start), size), generator=generator)
