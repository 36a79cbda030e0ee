"""Naive attention peak: the full map of every head."""

import torch
from torch import Tensor


def attention_peak(
    q: Tensor, k: Tensor, *, first: int = 0, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Sum over the queries of q [B, H, N, D] from `first` on of the largest of the heads' attention to each key of
    k [B, H, N, D]: [B, N]. bias: [1|B, 1|H, 1|N, N], added to the logits."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q @ k.transpose(-2, -1) * scale
    attention = (logits if bias is None else logits + bias).softmax(-1)
    return torch.stack([image[:, first:].max(0).values.sum(0) for image in attention])
