"""Multiply-adds of a model without a patch, for the rows that have no report of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.flop_count import MathAttention


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one image of `images` [B, C, H, W] through `model`, attention included (1 is 2 FLOPs)."""
    return count_multiply_adds(lambda: model(images[:1]))


def count_multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of whatever `run` computes, attention included."""
    # The counter sees fused attention as zero on CPU; the math backend turns it into matrix products that it sees.
    # Its module tracker fails without autograd on a parameter that is passed from block to block (CaiT's class token).
    with torch.enable_grad(), MathAttention(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2
