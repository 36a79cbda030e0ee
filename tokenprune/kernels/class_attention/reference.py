"""Naive class attention: the full map, some of its rows."""

import torch
from torch import Tensor


def class_attention(
    q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None, rows: int | slice = 0
) -> Tensor:
    """Rows [B, H, N] or [B, H, R, N] of softmax(q kᵀ scale + bias)."""
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + (torch.where(bias, 0.0, float("-inf")) if bias.dtype == torch.bool else bias)
    return logits.softmax(-1)[:, :, rows]
