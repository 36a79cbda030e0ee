"""SAM's encoder and Hiera with windows left out: the host's own block on one window of one image after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from naive_windows import best, importance, windows_of
from torch import Tensor, nn
from torch.nn import functional


def _count(windows: int, share: float) -> int:
    return max(1, math.ceil(share * windows - 1e-6))


@torch.no_grad()
def run_sam(model: nn.Module, x: Tensor, shares: Mapping[int, float]) -> Tensor:
    """Images x [B, 3, H, W] through timm's VisionTransformerSAM, whose blocks shares compute that share of their
    windows, rounded up; scored in front of the first of them behind each block of the whole grid."""
    hidden = model.norm_pre(model.patch_embed(x) + model.pos_embed)
    outputs = []
    for one in hidden:
        grid, activation = one, None
        for i, block in enumerate(model.blocks):
            if block.window_size == 0:
                grid, activation = block(grid[None])[0], None
            elif i in shares:
                activation = grid.abs().mean(-1).flatten() if activation is None else activation
                windows = windows_of(*grid.shape[:2], (block.window_size,) * 2, (0, 0))
                kept = best(importance(activation, windows), _count(len(windows), shares[i]))
                grid = _sam_block(block, grid, [windows[w] for w in kept])
            else:
                grid = block(grid[None])[0]
        outputs.append(grid)
    return model.forward_head(model.neck(torch.stack(outputs).permute(0, 3, 1, 2)))


def _sam_block(block: nn.Module, grid: Tensor, windows: list[list[int | None]]) -> Tensor:
    flat, side = grid.flatten(0, 1), block.window_size
    out = flat.clone()
    for window in windows:
        entered = [flat.new_zeros(flat.shape[1]) if t is None else block.norm1(flat[t]) for t in window]
        attended = block.ls1(block.attn(torch.stack(entered).view(1, side, side, -1))).view(side * side, -1)
        for place, t in enumerate(window):
            if t is not None:
                y = flat[t] + attended[place]
                out[t] = y + block.ls2(block.mlp(block.norm2(y)))
    return out.view_as(grid)


@torch.no_grad()
def run_hiera(model: nn.Module, x: Tensor, shares: Mapping[int, float]) -> tuple[Tensor, dict[int, list[list[int]]]]:
    """The same through timm's Hiera, scored in front of the first of these blocks behind each that pools. Returns the
    output and {block: tokens computed of each image, by their places in the image}."""
    hidden = model.unroll(model._pos_embed(model.patch_embed(x)))
    outputs, computed = [], {}
    for one in hidden:
        activation = None
        for i, block in enumerate(model.blocks):
            if i not in shares:
                one, activation = block(one[None])[0], activation if block.attn.q_stride == 1 else None
                continue
            places = model.reroll(torch.arange(len(one))[None, :, None], i)[0, :, :, 0]
            spatial = one[places.flatten()]
            side = round(block.attn.window_size**0.5)
            units = windows_of(*places.shape, (side, side), (0, 0))
            activation = spatial.abs().mean(-1) if activation is None else activation
            kept = best(importance(activation, units), _count(len(units), shares[i]))
            out = spatial.clone()
            for w in kept:
                out[units[w]] = block(spatial[units[w]][None])[0]
            computed.setdefault(i, []).append(sorted(t for w in kept for t in units[w] if t is not None))
            one = torch.empty_like(out).index_copy(0, places.flatten(), out)
        outputs.append(one)
    return model.forward_head(torch.stack(outputs)), computed


def near(got: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are the same but for rounding, and not constant over images."""
    return bool(functional.mse_loss(got, expected) < 1e-20 and (expected[0] - expected[1]).abs().max() > 0.01)
