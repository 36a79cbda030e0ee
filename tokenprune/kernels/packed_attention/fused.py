"""Packed attention by one launch for the whole batch: the backends that GPUs have.

Each takes q, k [T, H, D] and v [T, H, Dv] of images none of which is empty, and returns [T, H, Dv]. Those that take no
bias get it folded into the head dimension, so that none of them switches to a slower kernel for it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def fold_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose plain attention is the one with key_bias [T] added to the logits.

    Two more dimensions hold one for every query and bias / scale for every key, as a rounded value and the rest that
    the rounding lost; all head sizes become the same multiple of eight, which the kernels want.
    """
    bias = key_bias.to(torch.float32) / scale
    high = bias.to(k.dtype)
    low = torch.where(high.isfinite(), bias - high, 0.0).to(k.dtype)
    added = torch.stack([high, low], -1)[:, None].expand(-1, k.shape[1], -1)
    size = -(-max(k.shape[-1] + 2, v.shape[-1]) // 8) * 8
    q, k = torch.cat([q, torch.ones_like(added)], -1), torch.cat([k, added], -1)
    padded = [F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v)]
    return padded[0], padded[1], padded[2]


def cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each image starts, and the end of the last: int32 [B + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float) -> Tensor:
    """Flash attention over cumulative lengths, of torch (2.10 and later) or of the flash-attn package."""
    starts, longest = cumulative(lengths, q.device), max(lengths)
    parts = (q, k, v, starts, starts, longest, longest)
    torchs = optional("torch.nn.attention.varlen", "varlen_attn")
    if torchs is not None and dropout == 0.0:
        out: Tensor = torchs(*parts, scale=scale)
        return out
    out = optional("flash_attn", "flash_attn_varlen_func")(*parts, dropout_p=dropout, softmax_scale=scale)
    return out


def block_diagonal(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float) -> Tensor:
    """xformers' memory-efficient attention under a block-diagonal mask."""
    mask = optional("xformers.ops.fmha.attn_bias", "BlockDiagonalMask").from_seqlens(list(lengths), device=q.device)
    attend = optional("xformers.ops", "memory_efficient_attention")
    out: Tensor = attend(q[None], k[None], v[None], attn_bias=mask, p=dropout, scale=scale)
    return out[0]


def nested(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention over jagged nested tensors."""
    starts = cumulative(lengths, q.device).long()
    jagged = partial(
        torch.nested.nested_tensor_from_jagged, offsets=starts, min_seqlen=min(lengths), max_seqlen=max(lengths)
    )
    q, k, v = (jagged(x.contiguous()).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    values: Tensor = out.transpose(1, 2).values()
    return values


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float, dropout: float) -> Tensor:
    """FlexAttention with a block mask that lets a token see its own image."""
    attention = importlib.import_module("torch.nn.attention.flex_attention")
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    total = q.shape[0]
    mask = attention.create_block_mask(partial(_same_image, image), None, None, total, total, device=q.device)
    run = _compiled(attention.flex_attention) if q.is_cuda else attention.flex_attention
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: Tensor = run(*parts, block_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def _same_image(image: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return image[query] == image[key]


@cache
def _compiled(attend: Any) -> Any:
    return torch.compile(attend, dynamic=True)


@cache
def optional(module: str, name: str) -> Any:
    """`name` of an optional `module`, None where it is missing."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
