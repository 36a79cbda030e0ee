"""Cosine matching in plain torch, some rows at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.kernels.inputs import EPSILON, precision, product
from tokenprune.tables import table

# Bytes of similarities that a thread works on at a time, so that they stay in its cache.
CACHED = 2 * 2**20

# Columns up to which the calls cost more than what they do: one product, and torch.max with indices.
FEW = 48

# Columns of which the largest is found before the column is looked for.
GROUP = 128


def all_at_once(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As `cosine_match` without a window, in few calls, for devices where torch.max takes no longer with indices than
    without; of equals the first, as torch documents it."""
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=precision(x)).clamp_min_(EPSILON) for x in (a, b)]
    value, index = product(a, b.transpose(1, 2)).div_(norms[1].unsqueeze(1)).max(-1)
    return value / norms[0], index


def cosine_match(a: Tensor, b: Tensor, window: int | None, memory_limit: int) -> tuple[Tensor, Tensor]:
    """a [B, M, D], b [B, N, D] -> similarity [B, M] and row of b [B, M], holding at most `memory_limit` bytes of
    similarities at a time, but at least one row's."""
    dtype, device = precision(a), a.device
    batch, rows, others = a.shape[0], a.shape[1], b.shape[1]
    if device.type == "cuda" and window is None and batch * rows * others * dtype.itemsize <= memory_limit:
        return all_at_once(a, b)
    a, b = a.to(dtype), b.to(dtype)
    b = (b / torch.linalg.vector_norm(b, dim=-1, keepdim=True).clamp_min_(EPSILON)).transpose(1, 2)
    norms = torch.linalg.vector_norm(a, dim=-1).clamp_min_(EPSILON)
    work = min(memory_limit, CACHED * torch.get_num_threads()) if device.type == "cpu" else memory_limit
    if window is None and batch * rows * others * dtype.itemsize <= work:
        similarity = torch.bmm(a, b)
        if others <= FEW:
            value, index = similarity.max(-1)  # of equals the first, as torch documents it
            return value.div_(norms), index
        value, index = _best(similarity, table(_columns, others, dtype, like=a), others)
        return value.div_(norms), index.long()
    if window is None and device.type == "cpu":  # of larger blocks fewer pack b
        work = min(memory_limit, 2 * work)
    columns = table(_columns, others, dtype, like=a)
    value = a.new_empty(batch, rows)
    index = torch.empty(batch, rows, dtype=torch.long, device=device)
    block = max(1, min(rows, work // (others * dtype.itemsize)))
    if window is not None:  # as many rows as a window is wide, which see two windows' width together
        block = max(1, min(block, (2 * window + 1) * rows // others))
    images = max(1, min(batch, work // (block * others * dtype.itemsize)))
    buffer = a.new_empty(images * block * others)
    for image in range(0, batch, images):
        for start in range(0, rows, block):
            stop = min(rows, start + block)
            part = slice(image, image + images), slice(start, stop)
            low, high = 0, others
            if window is not None:
                low = max(0, start * others // rows - window)
                high = min(others, (stop - 1) * others // rows + window + 1)
            left, right = a[part], b[image : image + images, :, low:high]
            shape = (*left.shape[:2], right.shape[2])
            similarity = buffer[: math.prod(shape)].view(shape)
            torch.bmm(left, right, out=similarity)
            if window is not None:
                similarity.masked_fill_(outside(start, stop, columns[low:high], rows, others, window), float("-inf"))
            value[part], index[part] = _best(similarity, columns[low:high], others)
    return value / norms, index


def _columns(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=dtype, device=device)


def outside(start: int, stop: int, columns: Tensor, rows: int, others: int, window: int) -> Tensor:
    """Which of `columns` are outside the windows of the rows from `start` to `stop`: [stop - start, columns]."""
    centre = torch.arange(start, stop, device=columns.device) * others // rows
    return (columns - centre.unsqueeze(1)).abs() > window


def _best(similarity: Tensor, columns: Tensor, others: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and the lowest of the `columns` (< others) that reaches it; overwrites `similarity`.

    Four vectorised passes take half the time of torch.max with indices on a CPU; of many columns one pass finds the
    group with the largest, and the others see that group alone. NaN gives NaN and a valid column.
    """
    shape = similarity.shape
    groups, rest = divmod(shape[2], GROUP)
    if groups > 1 and rest == 0:
        within = similarity.view(-1, GROUP)
        best = within.amax(-1).view(-1, groups).max(-1).indices  # of equals the first
        own = table(_columns, len(best), torch.long, like=best) * groups + best
        value, column = _best(within.index_select(0, own).view(*shape[:2], GROUP), columns[:GROUP], others)
        return value, column + best.view(shape[:2]) * GROUP
    best = similarity.amax(-1, keepdim=True)
    below = torch.lt(similarity, best, out=similarity)
    return best.squeeze(-1), torch.add(columns, below, alpha=others, out=similarity).amin(-1)
