"""Naive attention mass: the full map, then one matrix-vector product an iteration."""

from torch import Tensor


def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    iterations: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`weights` [B, H, N] pushed `iterations` times through the transpose of softmax(q kT scale + bias)."""
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    attention = (logits if bias is None else logits + bias).softmax(-1)
    for _ in range(iterations):
        weights = (attention.transpose(-2, -1) @ weights.unsqueeze(-1)).squeeze(-1)
    return weights
