"""Scores read off one attention layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.attention_mass import attention_mass
from tokenprune.kernels.class_attention import class_attention


def attention_to_class(record: AttentionRecord) -> Tensor:
    """Attention that the class token pays each prunable token, mean over heads, [B, n] (EViT, Liang et al., 2022,
    equation 3); without a class token the attention received from all tokens."""
    if not record.has_class_token:
        return attention_received(record)
    q, k = record.rotated()
    row = class_attention(q, k, scale=record.scale, bias=record.bias)
    return row.mean(1)[:, record.num_prefix_tokens :]


def attention_received(record: AttentionRecord) -> Tensor:
    """Mean over heads and queries of the attention paid to each prunable token, [B, n]."""
    q, k = record.rotated()
    uniform = torch.full(q.shape[:3], 1.0 / q.shape[2], device=q.device)
    if record.alive is not None:  # queries that are none see nothing
        there = F.pad(record.alive.float(), (record.num_prefix_tokens, 0), value=1.0)
        uniform = (there / there.sum(1, keepdim=True))[:, None].expand(q.shape[:3])
    mass = attention_mass(q, k, uniform, scale=record.scale, bias=record.bias)
    return mass.mean(1)[:, record.num_prefix_tokens :]
