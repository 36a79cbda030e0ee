"""How well maps of classes agree: mean intersection over union, and shares of pixels, with intervals over images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval, percentile_ends, resample_weights

IGNORED = 255
"""The label of pixels that do not count, as in ADE20K and Pascal VOC; so does any negative one."""


def overlaps(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Pixels in the intersection and in the union of each class, of two maps of classes [N, h, w]: [N, 2, classes].
    Where `truth` is negative, or IGNORED and no class is called so, a pixel does not count.

    Raises TokenPruneError for a class that there is not.
    """
    counted = (truth >= 0) & ((truth != IGNORED) | (classes > IGNORED))
    numbers = [torch.where(counted, each + 1, 0) for each in (predicted, truth)]
    if int(numbers[1].max()) > classes:
        raise TokenPruneError(
            f"a map has class {int(numbers[1].max()) - 1}, and the model tells {classes} apart, from 0"
        )
    one, other = (nn.functional.one_hot(each.flatten(1), classes + 1)[..., 1:] > 0 for each in numbers)
    return torch.stack([(one & other).sum(1), (one | other).sum(1)], 1)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean over classes of intersection over union, each summed over images first: counts [..., N, 2, classes] of
    `overlaps` to [...]. A class that is nowhere does not count."""
    intersections, unions = counts.double().sum(-3).unbind(-2)
    return (intersections / unions).nanmean(-1)


def bootstrap_iou(counts: Tensor, *, groups: Tensor | None = None, seed: int = 0) -> tuple[Interval, Tensor]:
    """`mean_iou` of counts [N, 2, classes] with a 95% percentile interval over images, and its values [1 + resamples],
    which are paired over all counts of the same images. groups: as in `bootstrap_mean`."""
    weights = resample_weights(len(counts), groups=groups, seed=seed)
    sums = torch.einsum("rn,nkc->rkc", weights, counts.double().cpu())
    draws = mean_iou(sums[:, None])
    return interval_of(draws), draws


def interval_of(draws: Tensor) -> Interval:
    """The statistic and its interval, of its values in the order of `resample_weights`."""
    low, high = percentile_ends(draws)
    return Interval(float(draws[0]), float(low), float(high))
