"""Naive attention match: the full map of every head."""

import torch
from torch import Tensor


def attention_match(q: Tensor, k: Tensor, columns: Tensor, *, scale: float | None = None) -> Tensor:
    """For each query of q [B, H, M, D] the place in columns [B, K] of the key that gets most of its attention, in the
    mean over heads; k: [B, H, N, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mean = (q @ k.transpose(-2, -1) * scale).softmax(-1).mean(1)
    return torch.stack([image[:, chosen].argmax(-1) for image, chosen in zip(mean, columns, strict=True)])
