"""The attention match in plain torch, some rows of the map of some heads at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.inputs import precision

# Bytes of the map that a thread works on at a time, so that they stay in its cache.
CACHED = 2 * 2**20


def attention_match(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, log_sums: Tensor | None, memory_limit: int
) -> Tensor:
    """q [B, H, M, D], k [B, H, N, D], columns [B, K], log_sums [B, H, M] or None -> [B, M]."""
    dtype, (batch, heads, rows, _), wanted = precision(q), q.shape, columns.shape[1]
    work = min(memory_limit, CACHED * torch.get_num_threads()) if q.device.type == "cpu" else memory_limit
    row = (k.shape[2] if log_sums is None else wanted) * dtype.itemsize
    block = max(1, min(rows, work // row))
    together = max(1, work // (block * row))
    found = torch.empty(batch, rows, dtype=torch.long, device=q.device)
    for image in range(batch):
        order = columns[image] if log_sums is not None else _columns_in_front(columns[image], k.shape[2])
        ordered = k[image].index_select(1, order).to(dtype).transpose(1, 2)
        for start in range(0, rows, block):
            some = q[image, :, start : start + block].to(dtype)
            total = some.new_zeros(some.shape[1], wanted)
            for head in range(0, heads, together):
                part = slice(head, head + together)
                attention = (some[part] @ ordered[part]).mul_(scale)
                if log_sums is None:
                    attention = attention.softmax(-1)[..., :wanted]
                else:
                    attention.sub_(log_sums[image, part, start : start + block, None]).exp_()
                total += attention.sum(0)
            found[image, start : start + block] = total.argmax(-1)
    return found


def _columns_in_front(columns: Tensor, keys: int) -> Tensor:
    """An order [N] of the keys in which what is compared is a slice of each row."""
    others = torch.ones(keys, dtype=torch.bool, device=columns.device).index_fill_(0, columns, False)
    return torch.cat([columns, others.to(torch.int8).argsort(descending=True)[: keys - len(columns)]])
