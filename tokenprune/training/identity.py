"""What a training is of beside its settings, told cheaply: the images and labels, and the model's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tokenprune.evals.data import ImageData
from tokenprune.evals.identity import Identified, evenly
from tokenprune.evals.reading import from_workers
from tokenprune.training.sampling import ByTurn

GLIMPSES = 8
"""Images that are read as the first epoch sees them, transformed."""

CELLS = 4
"""Rows and columns of cells whose means are all that is kept of an image."""

READ_AGAIN = 16
"""How often at most they are read again, to tell a transform with a generator of its own, which may change few."""

LIKE = 0.01
"""How far the mean of a cell may be off, as a share of the largest: releases and machines decode and resize a little
differently."""

SAME = 1e-5
"""How far a weight may be off, relatively: machines resize a position embedding a little differently."""

TAKEN = 64
"""Values of a tensor of the model's that are kept."""


def of_data(data: ImageData, seed: int, workers: int = 0) -> dict[str, Any]:
    """facts: what the data set says of itself, by name. images: of `GLIMPSES` images, as a training with that seed sees
    them, the means of cells [k, C * CELLS ** 2]. labels: theirs [k, 1], or means of cells of their maps. workers:
    where there are some, one reads: a data set may open what no process behind it can share."""
    items = data.by_number()
    ((images, labels),) = _readings(data, seed, workers)
    told = items.identity() if isinstance(items, Identified) else {}
    facts = {"sizes of images": [list(one.shape) for one in images], **told}
    return {"facts": facts, "images": _cells(images), "labels": _cells(labels)}


def _readings(data: ImageData, seed: int, workers: int, times: int = 1) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Those images and their labels, read so often."""
    turns, items = [(0, i) for i in evenly(data.size, GLIMPSES)], ByTurn(data.by_number(), seed)
    every: Iterator[Any] = (items[turn] for _ in range(times) for turn in turns)
    if workers:
        generator = torch.Generator().manual_seed(seed)
        by_one: DataLoader[Any] = DataLoader(
            items, batch_size=None, sampler=turns * times, num_workers=1, generator=generator
        )
        every = from_workers(by_one)
    for _ in range(times):
        seen = list(islice(every, len(turns)))
        images, labels = ([torch.as_tensor(one) for one in column] for column in zip(*seen, strict=True))
        yield images, labels


def other_data(
    theirs: Mapping[str, Any], own: Mapping[str, Any], data: ImageData, seed: int, workers: int = 0
) -> list[str]:
    """In words what of `theirs` is another than what `own`, `of_data` of that data and seed, has."""
    facts = [name for name, fact in theirs["facts"].items() if not _alike(fact, own["facts"].get(name, fact))]
    if facts:
        return facts
    differs = _glimpsed(theirs, own)
    if not differs:
        return []
    # Of a transform that draws from a generator of its own readings are not alike, and nothing is told by one.
    for images, labels in _readings(data, seed, workers, READ_AGAIN):
        if _glimpsed(own, {"images": _cells(images), "labels": _cells(labels)}):
            return []
    return differs


def of_weights(tensors: Iterable[Tensor]) -> Tensor:
    """`TAKEN` values, evenly spaced, of each of those that are floating: [tensors, TAKEN]."""
    held = [one.detach().flatten() for one in tensors if isinstance(one, Tensor)]  # not a module's extra state
    floating = [one for one in held if one.is_floating_point() and one.numel()]
    spaced = [one[torch.arange(TAKEN, device=one.device) * len(one) // TAKEN].float().cpu() for one in floating]
    return torch.stack(spaced) if spaced else torch.empty(0, TAKEN)


def same_weights(theirs: Tensor, own: Tensor) -> bool:
    """Whether both are of the same weights, but for how machines round."""
    if theirs.shape != own.shape:
        return False
    finite = theirs.nan_to_num(0.0, 0.0, 0.0)
    scale = finite.abs() + finite.square().mean(1, keepdim=True).sqrt()
    equal = (theirs == own) | (theirs.isnan() & own.isnan())  # as of a mask in a buffer, of -inf
    return bool((equal | ((theirs - own).abs() <= SAME * scale)).all())


def _alike(theirs: Any, own: Any) -> bool:
    """Whether two facts are equal, lists of them where both are known."""
    if not isinstance(theirs, list) or not isinstance(own, list) or len(theirs) != len(own):
        return bool(theirs == own)
    return all(None in (a, b) or a == b for a, b in zip(theirs, own, strict=True))


def _cells(tensors: list[Tensor]) -> Tensor:
    """Of images [C, H, W] or maps [h, w] the means of cells, of numbers [] themselves: [k, n]."""
    values = [one.detach().cpu().double() for one in tensors]
    return torch.stack([(F.adaptive_avg_pool2d(x[None], CELLS) if x.ndim > 1 else x).flatten() for x in values])


def _glimpsed(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    found = []
    for name, far in (("labels", 0.1), ("images", LIKE * _largest(theirs["images"]))):
        a, b = theirs[name], own[name]
        known = a.isfinite().all(1) & b.isfinite().all(1) if a.shape == b.shape else None
        if known is None or bool(((a - b).abs() > far)[known].any()):
            found.append(name if name == "labels" else "images, or another transform")
    return found


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
