"""Weighted PageRank on the graph between image and text tokens (AT-EDM, Wang et al., CVPR 2024, section 3.2)."""

import math

import torch
from torch import Tensor

from tokenprune.attention_record import CrossAttention

_LEAST = 1e-12


def focus(attention: Tensor) -> Tensor:
    """Weights [B, H, T] in [0, 1] of the text tokens of a map [B, H, N, T]: 1 - entropy / log N of the image tokens'
    shares in the attention that a text token receives. One that all look at alike (a start or padding token) has 0."""
    shares = attention / attention.sum(2, keepdim=True).clamp_min(_LEAST)
    entropy = -torch.xlogy(shares, shares).sum(2)
    return (1 - entropy / math.log(max(2, attention.shape[2]))).clamp_min(0.0)


def cross_pagerank(cross: CrossAttention, iterations: int) -> Tensor:
    """Importance of every image token per head, [B, H, N], summing to one: from a uniform start the image tokens vote
    for the text tokens that they attend to (Aᵀ s), and these, weighted by `focus`, for the image tokens (A w s)."""
    attention = cross.attention()
    weights = focus(attention)
    scores = attention.new_full(attention.shape[:3], 1.0 / attention.shape[2])
    for _ in range(iterations):
        text = weights * (scores.unsqueeze(2) @ attention).squeeze(2)
        scores = (attention @ text.unsqueeze(3)).squeeze(3)
        scores = scores / scores.sum(-1, keepdim=True).clamp_min(_LEAST)
    return scores
