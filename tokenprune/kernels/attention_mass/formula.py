"""Attention mass by torch's own operators on the full map, for programs that have no others (ONNX)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.inputs import precision


def attention_mass(
    q: Tensor, k: Tensor, weights: Tensor, bias: Tensor | None, counts: Sequence[int], tolerance: float, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, M, D], k [B, H, N, D], weights [B, H, M], bias [1|B, 1|H, 1|M, N] -> the mass after each of `counts`,
    [len(counts), B, H, N], and the log-sum-exp of each row of logits [B, H, M].

    Raises:
        TokenPruneError: a tolerance, whose number of iterations the values decide.
    """
    if tolerance:
        raise TokenPruneError(
            "iterations as a tolerance cannot be exported to ONNX; use a count, such as iterations=30"
        )
    dtype = precision(q)
    logits = q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + (torch.where(bias, 0.0, float("-inf")) if bias.dtype == torch.bool else bias)
    log_sums = logits.logsumexp(-1)
    log_sums = log_sums.masked_fill(log_sums == float("-inf"), float("inf"))  # nothing to attend to: it pays nothing
    attention = (logits - log_sums.unsqueeze(-1)).exp()
    found, mass = list[Tensor](), weights.to(dtype)
    for step in range(1, max(counts) + 1):
        mass = (mass.unsqueeze(-2) @ attention).squeeze(-2)
        found += [mass] if step in counts else []
    return torch.stack(found), log_sums
