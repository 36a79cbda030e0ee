"""The attention match in plain torch, some rows of the map of one head at a time."""

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
    block = max(1, min(rows, work // (keys * dtype.itemsize)))
    images = max(1, min(batch, work // (block * keys * dtype.itemsize)))
    found = torch.empty(batch, rows, dtype=torch.long, device=q.device)
    for image in range(0, batch, images):
        some = slice(image, image + images)
        for start in range(0, rows, block):
            queries = q[some, :, start : start + block].to(dtype) * scale
            total = queries.new_zeros(queries.shape[0], queries.shape[2], keys)
            for head in range(heads):
                total += torch.bmm(queries[:, head], k[some, head].to(dtype).transpose(1, 2)).softmax(-1)
            compared = total.gather(2, columns[some, None].expand(-1, total.shape[1], -1))
            found[some, start : start + block] = compared.argmax(-1)
    return found
