"""Attention mass on tiles under a fixed memory limit.

One opaque operator, so that torch.compile and torch.export see a single node whatever the batch, and the tiles are
sized from the real one.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MEMORY_LIMIT = 64 * 2**20


def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    iterations: int = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Tensor:
    """Push weights through the attention graph: `iterations` times w <- Aᵀ w with A = softmax(q kᵀ scale + bias).

    q, k: [B, H, N, D]; weights: [B, H, N]; bias: [B or 1, H or 1, N or 1, N] or None; scale: D**-0.5 by default.
    Returns [B, H, N] in float32. As rows of A sum to one, the sum of the weights stays. A is held for as many
    (image, head) pairs at a time as fit `memory_limit` bytes. No gradient: scores only choose tokens. The step of
    weighted PageRank (Zero-TPrune, Wang et al., 2024, section 3.2).
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    mass: Tensor = _attention_mass(q, k, weights, bias, iterations, scale, memory_limit)
    return mass


@torch.library.custom_op("tokenprune::attention_mass", mutates_args=())
def _attention_mass(
    q: Tensor, k: Tensor, weights: Tensor, bias: Tensor | None, iterations: int, scale: float, memory_limit: int
) -> Tensor:
    batch, heads, tokens, _ = q.shape
    out = torch.empty(batch * heads, tokens, dtype=torch.float32, device=q.device)
    flat_q, flat_k = q.reshape(-1, tokens, q.shape[-1]), k.reshape(-1, tokens, k.shape[-1])
    flat_w = weights.reshape(-1, tokens).float()
    if bias is not None:
        bias = bias.expand(batch, heads, -1, -1)
    tile = max(1, memory_limit // (2 * 4 * tokens * tokens))
    for start in range(0, batch * heads, tile):
        rows = slice(start, min(start + tile, batch * heads))
        logits = torch.bmm(flat_q[rows].float() * scale, flat_k[rows].float().transpose(1, 2))
        if bias is not None:
            pairs = torch.arange(rows.start, rows.stop, device=q.device)
            logits += bias[pairs // heads, pairs % heads].float()
        attention = logits.softmax(-1)
        del logits
        mass = flat_w[rows].unsqueeze(1)
        for _ in range(iterations):
            mass = torch.bmm(mass, attention)
        out[rows] = mass.squeeze(1)
    return out.reshape(batch, heads, tokens)


@_attention_mass.register_fake
def _(
    q: Tensor, k: Tensor, weights: Tensor, bias: Tensor | None, iterations: int, scale: float, memory_limit: int
) -> Tensor:
    return q.new_empty(weights.shape, dtype=torch.float32)


@register_flop_formula(torch.ops.tokenprune.attention_mass)
def _flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    weights: tuple[int, ...],
    bias: tuple[int, ...] | None,
    iterations: int,
    scale: float,
    memory_limit: int,
    *args: object,
    **kwargs: object,
) -> int:
    batch, heads, tokens, dim = q
    return 2 * batch * heads * tokens * tokens * (dim + iterations)
