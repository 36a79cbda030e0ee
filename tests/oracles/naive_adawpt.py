"""Adaptive window pruning in loops over images, windows and tokens (Li et al., LMD-ViT, ICLR 2024, sections 3.2 and
3.3): confidences, the windows that they choose, and the loss that a mask guides. Nothing here comes from the package
under test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from naive_learned import gelu, layer_norm, linear
from naive_windows import run_block, windows_of
from torch import Tensor, nn

Learned = Mapping[str, Tensor]


def logits_of(grid: Tensor, learned: Learned) -> list[float]:
    """How confident each token of grid [H, W, C] is that its window should be computed."""
    hidden = [gelu(linear(x, learned, "embed")) for x in grid.reshape(-1, grid.shape[2])]
    half = len(hidden[0]) // 2
    whole = sum(x[half:] for x in hidden) / len(hidden)
    out = []
    for x in hidden:
        normed = layer_norm(torch.cat([x[:half], whole]), learned["norm.weight"], learned["norm.bias"])
        out.append(linear(normed, learned, "last").item())
    return out


def mean_of(logits: Sequence[float], window: Sequence[int | None]) -> float:
    """A window's confidence: the mean of its tokens', padding is none."""
    tokens = [t for t in window if t is not None]
    return sum(logits[t] for t in tokens) / len(tokens)


def run_stage(blocks: Sequence[nn.Module], grid: Tensor, learned: Learned) -> tuple[Tensor, list[list[int]]]:
    """One image [H, W, C] through the blocks of a stage; also the windows that each computes."""
    logits, chosen = logits_of(grid, learned), []
    for block in blocks:
        windows = windows_of(*grid.shape[:2], tuple(block.window_size), tuple(block.shift_size))
        above = [w for w, window in enumerate(windows) if mean_of(logits, window) > float(learned["threshold"])]
        chosen.append(above)
        grid = run_block(block, grid, above)
    return grid, chosen


def guidance(logits: Sequence[float], windows: Sequence[Sequence[int | None]], blurred: Sequence[bool]) -> float:
    """Cross-entropy of the windows' confidences with whether any of their tokens is blurred, the mean over windows."""
    total = 0.0
    for window in windows:
        probability = 1 / (1 + math.exp(-mean_of(logits, window)))
        wanted = any(blurred[t] for t in window if t is not None)
        total -= math.log(probability if wanted else 1 - probability)
    return total / len(windows)


def blurred_tokens(mask: Tensor, patch: int) -> list[bool]:
    """Of each patch of mask [H, W] whether any of its pixels is blurred, row by row."""
    rows, columns = mask.shape[0] // patch, mask.shape[1] // patch
    return [
        any(bool(mask[i * patch + y, j * patch + x]) for y in range(patch) for x in range(patch))
        for i in range(rows)
        for j in range(columns)
    ]
