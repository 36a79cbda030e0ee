"""The attention match in plain torch, some rows of the map of one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.inputs import BINARY, precision, product, some_rows
from tokenprune.kernels.merge.eager import gather


def all_at_once(q: Tensor, k: Tensor, columns: Tensor, scale: float, log_sums: Tensor | None) -> Tensor:
    """As `attention_match` with the maps of all heads in memory, in few calls."""
    batch, heads, rows, _ = q.shape
    if log_sums is not None:
        k = gather(k, columns, 2)
    maps = product(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).mul_(scale).view(batch, heads, rows, -1)
    if log_sums is None:
        return gather(maps.softmax(-1).sum(1), columns, 2).argmax(-1)
    return maps.sub_(log_sums.unsqueeze(-1)).exp_().sum(1).argmax(-1)


def attention_match(
    q: Tensor, k: Tensor, columns: Tensor, scale: float, log_sums: Tensor | None, memory_limit: int
) -> Tensor:
    """q [B, H, M, D], k [B, H, N, D], columns [B, K], log_sums [B, H, M] or None -> [B, M]."""
    dtype, (batch, heads, rows, _) = precision(q), q.shape
    keys = k.shape[2] if log_sums is None else columns.shape[1]
    if q.is_cuda and 2 * batch * heads * rows * keys * dtype.itemsize <= memory_limit:
        return all_at_once(q, k, columns, scale, log_sums)
    found = torch.empty(batch, rows, dtype=torch.long, device=q.device)
    of_heads: list[Tensor] = []
    for some, part in some_rows(batch, rows, keys * dtype.itemsize, memory_limit, q.device):
        if part.start == 0:
            of_heads = list(k[some].to(dtype).unbind(1))
            if log_sums is not None:
                of_heads = [functional.pad(gather(head, columns[some], 1), (0, 1), value=1.0) for head in of_heads]
        queries = q[some, :, part].to(dtype) * (scale if log_sums is None else scale * BINARY)
        if log_sums is not None:  # taken off in the product, which costs less than a pass over the map
            queries = torch.cat([queries, log_sums[some, :, part, None].to(dtype) * -BINARY], -1)
        total = queries.new_zeros(queries.shape[0], queries.shape[2], keys)
        for head, others in enumerate(of_heads):
            attention = torch.bmm(queries[:, head], others.transpose(1, 2))
            total += attention.softmax(-1) if log_sums is None else attention.exp2_()
        if log_sums is None:
            total = total.gather(2, columns[some, None].expand(-1, total.shape[1], -1))
        found[some, part] = total.argmax(-1)
    return found
