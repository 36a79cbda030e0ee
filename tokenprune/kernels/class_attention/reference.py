"""Naive class attention: the full map, its first row."""

from torch import Tensor


def class_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """First row [B, H, N] of softmax(q kT scale + bias)."""
    logits = q @ k.transpose(-2, -1) * scale
    return (logits if bias is None else logits + bias).softmax(-1)[:, :, 0]
