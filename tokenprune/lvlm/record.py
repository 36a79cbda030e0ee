"""What a selection sees of visual tokens behind the tower."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord


def record_of(
    features: Tensor, grid: tuple[int, int] | None, metric: Tensor | None, text: Tensor | None = None
) -> AttentionRecord:
    """What a selection sees of images with features [B, n, C]."""
    return AttentionRecord(
        hidden=features,
        origin=torch.arange(features.shape[1], device=features.device).expand(len(features), -1),
        num_prefix_tokens=0,
        place=0,
        depth=1,
        grid=grid,
        has_class_token=False,
        keys=metric.unsqueeze(1) if metric is not None else None,
        text=text,
    )
