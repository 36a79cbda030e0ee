"""The attention match in plain torch, some rows of the map of some heads at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.inputs import precision

# Bytes of the map that a thread works on at a time, so that they stay in its cache.
CACHED = 2 * 2**20


def attention_match(q: Tensor, k: Tensor, columns: Tensor, scale: float, memory_limit: int) -> Tensor:
    """q [B, H, M, D], k [B, H, N, D], columns [B, K] -> [B, M]."""
    dtype, (batch, heads, rows, _), keys = precision(q), q.shape, k.shape[2]
    work = min(memory_limit, CACHED * torch.get_num_threads()) if q.device.type == "cpu" else memory_limit
    row = keys * dtype.itemsize
    block = max(1, min(rows, work // row))
    together = max(1, work // (block * row))
    found = torch.empty(batch, rows, dtype=torch.long, device=q.device)
    for image in range(batch):
        # With the columns in front, what is compared is a slice of each row.
        others = torch.ones(keys, dtype=torch.bool, device=q.device).index_fill_(0, columns[image], False)
        order = torch.cat([columns[image], others.to(torch.int8).argsort(descending=True)[: keys - columns.shape[1]]])
        ordered = k[image].index_select(1, order).to(dtype).transpose(1, 2)
        for start in range(0, rows, block):
            some = q[image, :, start : start + block].to(dtype)
            total = some.new_zeros(some.shape[1], columns.shape[1])
            for head in range(0, heads, together):
                part = slice(head, head + together)
                attention = (some[part] @ ordered[part]).mul_(scale).softmax(-1)
                total += attention[..., : columns.shape[1]].sum(0)
            found[image, start : start + block] = total.argmax(-1)
    return found
