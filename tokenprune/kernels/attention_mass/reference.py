"""Naive attention mass: the full map, then one vector-matrix product an iteration."""

import torch
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
    """`weights` [B, H, M] pushed `iterations` times through softmax(q kᵀ scale + bias): [B, H, N].

    A query that may attend to nothing pays nothing.
    """
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is None:
        attention = logits.softmax(-1)
    else:
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, float("-inf"))
        attention = torch.where((bias == float("-inf")).all(-1, keepdim=True), 0.0, (logits + bias).softmax(-1))
    for _ in range(iterations):
        weights = (weights.unsqueeze(-2) @ attention).squeeze(-2)
    return weights
