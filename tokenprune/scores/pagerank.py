"""Weighted PageRank on the attention graph (Zero-TPrune, Wang et al., CVPR 2024, section 3.2)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.attention_mass import attention_mass, mass_and_log_sums


def start_mass(record: AttentionRecord, *, class_start: bool = True) -> Tensor:
    """Where the PageRank starts, [B, H, N], of sum one: uniform but for the class token, which has sqrt(N) times the
    others' where `class_start`."""
    q = record.q
    if not (class_start and record.has_class_token):
        return torch.full(q.shape[:3], 1.0 / q.shape[2], device=q.device)
    start = torch.ones(q.shape[:3], device=q.device)
    start.select(2, 0).fill_(start.shape[2] ** 0.5)
    return start / start.sum(-1, keepdim=True)


def weighted_pagerank(
    record: AttentionRecord, iterations: int | float | Sequence[int], *, class_start: bool = True
) -> Tensor:
    """Importance of every token per head, [B, H, N]: s <- A_hᵀ s, `iterations` times (Algorithm 1); or until it has
    settled, or after each of several counts [len(iterations), B, H, N], as in `attention_mass`.

    The result of each head sums to one.
    """
    q, k = record.rotated()
    start = start_mass(record, class_start=class_start)
    if record.log_sums is None:
        return attention_mass(q, k, start, iterations=iterations, scale=record.scale, bias=record.bias)
    mass, log_sums = mass_and_log_sums(q, k, start, iterations=iterations, scale=record.scale, bias=record.bias)
    record.log_sums.append(log_sums)
    return mass


def passing_heads(scores: Tensor, variance: tuple[float, float] | None) -> Tensor:
    """Variance-based head filter (section 3.2, VHF): which heads count, [..., B, H, 1] of booleans.

    scores: [..., B, H, n] of the prunable tokens. A head passes where the variance over the tokens of its scores,
    rescaled to mean one, lies in `variance`; raw scores sum to one, their variance is near 1e-5 and no head would ever
    pass the paper's thresholds of 0.01 and 0.7. If no head of an image passes, all count. None: all count.
    """
    if variance is None:
        return torch.ones_like(scores[..., :1], dtype=torch.bool)
    spread = (scores / scores.mean(-1, keepdim=True)).var(-1, keepdim=True, unbiased=False)
    low, high = map(float, variance)  # clamp refuses bounds that the scores' dtype does not hold
    passed = (spread >= low) & (spread <= high)
    return passed >= passed.any(-2, keepdim=True)


def fuse_heads(scores: Tensor, heads: Tensor | None = None, how: Literal["rms", "mean"] = "rms") -> Tensor:
    """Head fusion that emphasises informative regions (section 3.2, EIR): the root mean square over the heads that
    count, or their mean. scores: [..., B, H, n], heads: [..., B, H, 1] of booleans, None where all count. Returns
    [..., B, n]."""
    values = scores if how == "mean" else scores.square()
    fused = values.sum(-2) / values.shape[-2] if heads is None else (heads * values).sum(-2) / heads.sum(-2)
    return fused if how == "mean" else fused.sqrt()
