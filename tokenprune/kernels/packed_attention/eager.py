"""Packed attention by torch's own scaled_dot_product_attention, once for each stretch of images of equal length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def per_length(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Any device, dtype and head size, and whatever attention backend the caller has chosen."""
    out, start = [], 0
    for length, images in itertools.groupby(lengths):
        count = sum(1 for _ in images)
        rows = slice(start, start + count * length)
        start = rows.stop
        one_q, one_k, one_v = (x[rows].reshape(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        bias = key_bias[rows].reshape(count, 1, 1, length).to(q.dtype) if key_bias is not None else None
        one = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=bias, dropout_p=dropout, scale=scale)
        out.append(one.transpose(1, 2).flatten(0, 1))
    if len(out) == 1:
        return out[0]
    return torch.cat(out) if out else torch.zeros_like(v)
