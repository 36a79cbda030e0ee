"""RAS: region-adaptive sampling of diffusion transformers (Liu et al., "Region-Adaptive Sampling for Diffusion
Transformers", 2025, arXiv 2502.10389)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.over_steps import Memory, OverSteps, at_steps
from tokenprune.errors import UnsupportedMethod
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_top_k


@register_method("ras")
def ras(
    *,
    rate: float = 0.5,
    dense_steps: tuple[float, ...] = (0, 1, 2, 3, 12, 22),
    active: Literal["low", "high"] = "low",
    starvation: float = 0.1,
) -> Method:
    """At each step run only the active tokens through the transformer; the others keep their keys and values, and their
    prediction is that of the last step at which they were active.

    Active are the tokens where the last prediction deviates least from its mean over the channels (`active="low"`, as
    the published code selects) or most ("high", as one may also read it); the longer a token has not been, the sooner
    it is again.

    rate: share of active tokens. dense_steps: numbers of a run's steps (the paper's has 30), or shares of it, at which
    all are active. starvation: how strongly a token is favoured for each step at which it was left out (the published
    code, read literally, makes it less likely to come back).
    """
    if active not in ("low", "high"):
        raise UnsupportedMethod(f"active is 'low' or 'high', got {active!r}")
    return Method(
        name="ras",
        paper="Liu et al., Region-Adaptive Sampling, 2025",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"steps"}),
        stack_share=rate,
        stack_depth=1 << 30,
        recover="residual",
        over_steps=OverSteps(
            reuses="tokens",
            dense=at_steps(dense_steps),
            score=partial(activity, sign=1.0 if active == "high" else -1.0, starvation=starvation),
        ),
    )


def activity(record: AttentionRecord, memory: Memory, sign: float, starvation: float) -> Tensor:
    """Which tokens to run, [B, N]: sign * log(deviation) + starvation * (steps left out), of which the order is that of
    deviation ** sign * exp(starvation * steps)."""
    grid = record.grid
    deviations = [deviation(prediction, memory.channels, grid) for prediction in memory.predictions]
    return sign * torch.stack(deviations).mean(0).clamp(min=1e-12).log() + starvation * memory.dropped


def deviation(prediction: Tensor, channels: int, grid: tuple[int, int] | None) -> Tensor:
    """Standard deviation over the channels, the mean over each token's patch: [B, C, H, W] or [B, N, C] -> [B, N]."""
    if prediction.ndim == 3:
        return prediction.float().std(-1)
    assert grid is not None
    spread = prediction[:, :channels].float().std(1, keepdim=True)
    return functional.adaptive_avg_pool2d(spread, grid).flatten(1)
