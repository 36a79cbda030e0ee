"""Naive packed attention: one image after another, one head after another, the full map of each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kT scale + bias of the key) v within each image; q, k [T, H, D], v [T, H, Dv], key_bias [T]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        heads = []
        for head in range(q.shape[1]):
            logits = q[rows, head] @ k[rows, head].T * scale
            if key_bias is not None:
                logits = logits + key_bias[rows]
            heads.append(logits.softmax(-1) @ v[rows, head])
        out.append(torch.stack(heads, 1))
        start += length
    return torch.cat(out) if out else v[:0]
