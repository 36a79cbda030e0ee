"""A few rows of attention in plain torch, O(N d)."""

import torch
from torch import Tensor

from tokenprune.kernels.inputs import precision, product


def few_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q kᵀ scale for a few queries q [B, H, R, D] and keys [B, H, N, D]: [B, H, R, N].

    On a CPU image by image where heads and tokens of several are interleaved in memory, as a fused projection leaves
    them: a product over all would copy the keys first, which costs more than the product.
    """
    if k.is_cuda:
        logits = product((q * scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        return logits.view(*q.shape[:3], k.shape[2])
    dtype = precision(q)
    q = q.to(dtype) * scale
    if k.device.type != "cpu" or k.shape[0] == 1 or k.is_contiguous():
        return q @ k.to(dtype).transpose(-2, -1)
    out = q.new_empty(*q.shape[:3], k.shape[2])
    for image in range(q.shape[0]):
        torch.bmm(q[image], k[image].to(dtype).transpose(1, 2), out=out[image])
    return out
