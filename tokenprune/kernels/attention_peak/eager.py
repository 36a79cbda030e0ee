"""The attention peak in plain torch, some rows of the map of one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.kernels.inputs import additive, precision, some_rows


def attention_peak(q: Tensor, k: Tensor, first: int, scale: float, bias: Tensor | None, memory_limit: int) -> Tensor:
    """q, k [B, H, N, D] -> [B, N]."""
    dtype, (batch, _, tokens, _) = precision(q), q.shape
    received = q.new_zeros(batch, k.shape[2], dtype=dtype)
    own = behind(bias, first)
    for some, part in some_rows(batch, tokens - first, k.shape[2] * dtype.itemsize, memory_limit, q.device):
        added = own if own is None or own.shape[0] == 1 else own[some]
        added = added if added is None or added.shape[2] == 1 else added[:, :, part]
        received[some] += largest(q[some, :, first:][:, :, part].to(dtype), k[some].to(dtype), scale, added).sum(1)
    return received


def behind(bias: Tensor | None, first: int) -> Tensor | None:
    """A bias of the queries from `first` on."""
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, first:]


def largest(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The largest of the heads' attention of some rows q [B, H, R, D] to all keys k [B, H, N, D]: [B, R, N]."""
    most: Tensor | None = None
    for head in range(q.shape[1]):
        logits = torch.bmm(q[:, head] * scale, k[:, head].transpose(1, 2))
        if bias is not None:
            logits = logits + additive(bias[:, 0 if bias.shape[1] == 1 else head])
        attention = logits.softmax(-1)
        most = attention if most is None else torch.maximum(most, attention)
    assert most is not None
    return most
