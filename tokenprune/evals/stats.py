"""Means and medians with bootstrap intervals, drawn by a generator of their own (the global RNG is never touched)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    values: Tensor | Sequence[float],
    *,
    groups: Tensor | None = None,
    support: tuple[float, float] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Mean of `values` [n] with a percentile bootstrap interval.

    groups: [n], equal for values that are not independent (crops of one photograph); whole groups are drawn then.
    support: the least and the greatest value there can be, such as (0, 1) for right or wrong.

    A sample of n equal values gives an interval of width zero, which claims too much. Where the support is known it is
    widened by what n equal answers leave possible: an outcome at its end as likely as the Clopper-Pearson bound.
    An empty sample gives NaN thrice.
    """
    data = torch.as_tensor(values, dtype=torch.float64).cpu()
    sums, sizes = _by_group((data, torch.ones_like(data)), groups)
    interval = bootstrap(
        len(sums), lambda draw: sums[draw].sum(1) / sizes[draw].sum(1), seed=seed, resamples=resamples, level=level
    )
    if support is None or len(sums) == 0 or data.amin() < data.amax():
        return interval
    reach, mean = _reach(len(sums), level), interval.estimate
    return Interval(mean, mean - reach * (mean - support[0]), mean + reach * (support[1] - mean))


def bootstrap_share(
    values: Tensor,
    reference: Tensor,
    *,
    groups: Tensor | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Mean of `values` [n] over the mean of `reference` [n], both in [0, 1] and of the same items, which are drawn in
    pairs; groups as in `bootstrap_mean`.

    Where no item differs the interval is what n items without a difference leave possible. NaN where the reference, or
    a resample of it, has a mean of zero.
    """
    ours, theirs = values.double().cpu(), reference.double().cpu()
    sums, bases = _by_group((ours, theirs), groups)
    if not theirs.any():
        return Interval(math.nan, math.nan, math.nan)
    interval = bootstrap(
        len(sums), lambda draw: sums[draw].sum(1) / bases[draw].sum(1), seed=seed, resamples=resamples, level=level
    )
    if not torch.equal(ours, theirs):
        return interval
    reach = _reach(len(sums), level) / float(theirs.mean())
    return Interval(interval.estimate, interval.estimate - reach, interval.estimate + reach)


def bootstrap_median(
    values: Tensor | Sequence[float], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Interval:
    """Median of `values` [n] (mean of the two middle ones for even n) with a percentile bootstrap interval."""
    data = torch.as_tensor(values, dtype=torch.float64).cpu()
    return bootstrap(
        len(data), lambda draw: data[draw].quantile(0.5, dim=1), seed=seed, resamples=resamples, level=level
    )


def resample_weights(count: int, *, groups: Tensor | None = None, seed: int = 0, resamples: int = 1000) -> Tensor:
    """How often each of `count` values is in each bootstrap sample: [1 + resamples, count], float64.

    The first row is the sample as it is. For statistics that take weights, and where several are to be computed on the
    same samples. groups: as in `bootstrap_mean`.
    """
    labels = torch.arange(count) if groups is None else groups.cpu()
    _, member = torch.unique(labels, return_inverse=True)
    size = int(member.max()) + 1
    times = [torch.ones(1, size, dtype=torch.float64)]
    for index in _resample(size, resamples, torch.Generator().manual_seed(seed)):
        rows = torch.zeros(len(index), size, dtype=torch.float64)
        times.append(rows.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64)))
    return torch.cat(times)[:, member]


def percentile_ends(draws: Tensor, *, centred: bool = False, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the percentile interval of a statistic: draws [1 + resamples, ...], in the order of
    `resample_weights`, to two of [...]. Where a resample gives no number (NaN) the ends are NaN.

    centred: both ends moved so that the median resample is at the estimate, for statistics that any noise pushes to one
    side, such as a divergence: resampling adds noise, and the plain interval would lie beside the estimate.
    """
    tail = (1.0 - level) / 2.0
    places = torch.tensor([tail, 0.5, 1.0 - tail], dtype=torch.float64)
    low, median, high = draws[1:].double().quantile(places, dim=0)
    shift = draws[0] - median if centred else torch.zeros_like(median)
    return low + shift, high + shift


def _by_group(columns: Iterable[Tensor], groups: Tensor | None) -> list[Tensor]:
    """The sums over each group of columns [n], [number of groups] each; `groups=None` has every item alone."""
    if groups is None:
        return list(columns)
    names, member = torch.unique(groups.cpu(), return_inverse=True)
    return [torch.zeros(len(names), dtype=torch.float64).index_add_(0, member, column) for column in columns]


def _reach(count: int, level: float) -> float:
    """The Clopper-Pearson bound of an outcome that none of `count` items shows."""
    return float(1.0 - ((1.0 - level) / 2.0) ** (1.0 / count))


def bootstrap(
    count: int,
    statistic: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """A statistic of a sample of `count` with a percentile bootstrap interval. statistic: rows of indices [rows, count]
    into the sample -> its values [rows]."""
    if count == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.cat([statistic(index) for index in _resample(count, resamples, generator)])
    tail = (1.0 - level) / 2.0
    low, high = draws.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(float(statistic(torch.arange(count)[None])), low, high)


def _resample(size: int, resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index tensors [rows, size], at most about four million draws at a time."""
    rows = max(1, 4_000_000 // size)
    for start in range(0, resamples, rows):
        yield torch.randint(size, (min(rows, resamples - start), size), generator=generator)
