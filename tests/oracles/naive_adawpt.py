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


def run_stage(
    blocks: Sequence[nn.Module],
    grid: Tensor,
    learned: Learned,
    before: Mapping[tuple[int, int], Sequence[int]] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """One image [H, W, C] through the blocks of a stage; also the windows that each computes. before: by their shift,
    those that the stage before it, of the same resolution, has computed."""
    logits, chosen = logits_of(grid, learned), []
    for block in blocks:
        windows = windows_of(*grid.shape[:2], tuple(block.window_size), tuple(block.shift_size))
        above = [w for w, window in enumerate(windows) if mean_of(logits, window) > float(learned["threshold"])]
        if before is not None:
            above = [w for w in above if w in before[tuple(block.shift_size)]]
        chosen.append(above)
        grid = run_block(block, grid, above)
    return grid, chosen


def guidance(
    logits: Sequence[float],
    windows: Sequence[Sequence[int | None]],
    blurred: Sequence[bool],
    *,
    told: Sequence[float] | None = None,
    gains: Sequence[float] | None = None,
) -> float:
    """Cross-entropy of the windows' confidences with whether any of their tokens is blurred, the mean over windows.
    told: of each window one, or zero where nothing is decided. gains: of each token, by whose sum a blurred window
    weighs, its mean over those being one, at most 15."""
    wanted = [any(blurred[t] for t in window if t is not None) for window in windows]
    weights = [1.0] * len(windows)
    if gains is not None:
        own = [max(sum(gains[t] for t in window if t is not None), 0.0) for window in windows]
        mean = sum(one for one, is_blurred in zip(own, wanted, strict=True) if is_blurred) / max(sum(wanted), 1)
        heavy = [min(one / mean, 15.0) if mean > 0 else 0.0 for one in own]
        weights = [heavy[w] if wanted[w] else 1.0 for w in range(len(windows))]
    total = 0.0
    for w, window in enumerate(windows):
        probability = 1 / (1 + math.exp(-mean_of(logits, window)))
        entropy = -math.log(probability if wanted[w] else 1 - probability)
        total += entropy * weights[w] * (1.0 if told is None else told[w])
    return total / len(windows)


def blurred_tokens(mask: Tensor, patch: int) -> list[bool]:
    """Of each patch of mask [H, W] whether any of its pixels is blurred, row by row."""
    rows, columns = mask.shape[0] // patch, mask.shape[1] // patch
    return [
        any(bool(mask[i * patch + y, j * patch + x]) for y in range(patch) for x in range(patch))
        for i in range(rows)
        for j in range(columns)
    ]
