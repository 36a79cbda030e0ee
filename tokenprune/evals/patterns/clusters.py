"""How far two partitions of the patches agree (Rosenberg and Hirschberg, "V-Measure", EMNLP 2007, equations 1 to 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Agreement(NamedTuple):
    """homogeneity: how far each cluster of the second partition lies in one of the first. completeness: the other way
    round. v_measure: their harmonic mean, which is the mutual information over the mean entropy (NMI)."""

    homogeneity: Tensor
    completeness: Tensor
    v_measure: Tensor


def cluster_agreement(first: Tensor, second: Tensor) -> Agreement:
    """Agreement of two cluster maps, each of its tensors [...].

    first, second: [..., N], for each patch the number of its cluster, in any numbering; -1 where it is in none. Patches
    that are in none of either map are left out; where no patch is left the three are NaN.
    """
    known = (first >= 0) & (second >= 0)
    first, second = (torch.where(known, labels.long(), -1) for labels in (first, second))
    both = torch.where(known, first * (second.amax() + 1) + second, -1)
    of_first, of_second, joint = (_entropy(labels, known) for labels in (first, second, both))
    information = (of_first + of_second - joint).clamp(min=0)
    homogeneity = torch.where(of_first > 0, information / of_first, 1.0)
    completeness = torch.where(of_second > 0, information / of_second, 1.0)
    total = homogeneity + completeness
    harmonic = torch.where(total > 0, 2 * homogeneity * completeness / total, 0.0)
    undefined = torch.where(known.any(-1), 0.0, torch.nan).double()
    return Agreement(homogeneity + undefined, completeness + undefined, harmonic + undefined)


def merges(groups: Tensor) -> Tensor:
    """Whether any two patches of cluster maps `groups` [..., N] (-1 for none) share a cluster: [...], bool."""
    ordered = groups.sort(-1).values
    return ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)


def _entropy(labels: Tensor, known: Tensor) -> Tensor:
    """In nats, of the labels [..., N] where `known`: the mean over patches of -log(share of its label)."""
    ordered = labels.sort(-1).values.contiguous()
    labels = labels.contiguous()
    same = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    count = known.sum(-1, keepdim=True).clamp(min=1)
    surprise = -(same.double() / count).log()
    return surprise.where(known, 0.0).sum(-1) / count.squeeze(-1)
