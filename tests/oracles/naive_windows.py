"""Swin with windows left out, in loops over images, windows and tokens (Chen et al., "SparseViT", CVPR 2023, section
3.1 and its published code; Liu et al., "Swin Transformer", 2021, section 3.2, as timm runs it)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def windows_of(rows: int, columns: int, size: tuple[int, int], shift: tuple[int, int]) -> list[list[int | None]]:
    """The tokens of each window, row by row, None for padding: the grid is rolled, and then padded at its end."""
    down, across = -(-rows // size[0]), -(-columns // size[1])
    found = []
    for top in range(down):
        for left in range(across):
            window: list[int | None] = []
            for i in range(top * size[0], (top + 1) * size[0]):
                for j in range(left * size[1], (left + 1) * size[1]):
                    inside = i < rows and j < columns
                    window.append((i + shift[0]) % rows * columns + (j + shift[1]) % columns if inside else None)
            found.append(window)
    return found


def band(position: int, length: int, size: int, shift: int) -> int:
    """Which of the three bands of a rolled side a position is in: two that met by rolling do not see each other."""
    return 0 if position < length - size else 1 if position < length - shift else 2


def regions_of(rows: int, columns: int, size: tuple[int, int], shift: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """The bands of each token of each window, as in `windows_of`; of rolled windows."""
    down, across = -(-rows // size[0]) * size[0], -(-columns // size[1]) * size[1]
    return [
        [
            (band(i, down, size[0], shift[0]), band(j, across, size[1], shift[1]))
            for i in range(top, top + size[0])
            for j in range(left, left + size[1])
        ]
        for top in range(0, down, size[0])
        for left in range(0, across, size[1])
    ]


def importance(activation: Tensor, windows: Sequence[Sequence[int | None]]) -> list[float]:
    """L2 norm of each window's token activations [n]."""
    return [math.sqrt(sum(float(activation[t]) ** 2 for t in window if t is not None)) for window in windows]


def best(scores: Sequence[float], count: int) -> list[int]:
    """The windows of the `count` highest scores."""
    return sorted(sorted(range(len(scores)), key=lambda w: -scores[w])[:count])


def bias_of(attention: nn.Module, size: tuple[int, int]) -> list[list[Tensor]]:
    """Relative position bias [H] of each pair of places in a window."""
    table = getattr(attention, "relative_position_bias_table", None)
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]
    out = []
    for i, j in places:
        row = []
        for k, m in places:
            if table is not None:
                row.append(table[(i - k + size[0] - 1) * (2 * size[1] - 1) + j - m + size[1] - 1])
            else:
                row.append(16 * torch.sigmoid(attention.cpb_mlp(_coordinates(attention, size, (i - k, j - m)))))
        out.append(row)
    return out


def _coordinates(attention: nn.Module, size: tuple[int, int], offset: tuple[int, int]) -> Tensor:
    values = []
    for side, delta, pretrained in zip(size, offset, attention.pretrained_window_size, strict=True):
        x = 8 * delta / max((pretrained if attention.pretrained_window_size[0] > 0 else side) - 1, 1)
        values.append(math.copysign(math.log2(abs(x) + 1) / math.log2(8), x))
    return torch.tensor(values, dtype=attention.proj.weight.dtype)


def attend(attention: nn.Module, x: Tensor, bias: list[list[Tensor]], regions: Sequence[tuple[int, int]]) -> Tensor:
    """Attention among the tokens x [T, C] of one window."""
    count, heads = x.shape[0], attention.num_heads
    cosine = hasattr(attention, "logit_scale")
    if cosine:
        rows = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
        qkv = x @ attention.qkv.weight.T + rows
    else:
        qkv = attention.qkv(x)
    width = qkv.shape[1] // 3
    q, k, v = (qkv[:, i * width : (i + 1) * width].reshape(count, heads, -1) for i in range(3))
    out = torch.zeros_like(v)
    for h in range(heads):
        for i in range(count):
            logits = []
            for j in range(count):
                if cosine:
                    product = (q[i, h] / q[i, h].norm().clamp_min(1e-12)) @ (k[j, h] / k[j, h].norm().clamp_min(1e-12))
                    product = product * attention.logit_scale[h, 0, 0].clamp(max=math.log(100)).exp()
                else:
                    product = q[i, h] @ k[j, h] / math.sqrt(q.shape[2])
                logits.append(product + bias[i][j][h] - (100 if regions[i] != regions[j] else 0))
            out[i, h] = torch.softmax(torch.stack(logits), 0) @ v[:, h]
    return attention.proj(out.reshape(count, width))


def run_block(block: nn.Module, x: Tensor, kept: Sequence[int]) -> Tensor:
    """One image x [H, W, C] through a block that computes the windows `kept` alone."""
    rows, columns, channels = x.shape
    size, shift = tuple(block.window_size), tuple(block.shift_size)
    windows, regions = windows_of(rows, columns, size, shift), regions_of(rows, columns, size, shift)
    bias, flat = bias_of(block.attn, size), x.reshape(-1, channels)
    out = flat.clone()
    behind = hasattr(block.attn, "logit_scale")  # Swin v2 normalises behind attention and MLP
    for w in kept:
        window = windows[w]
        zero = flat.new_zeros(channels)
        entered = [zero if t is None else flat[t] if behind else block.norm1(flat[t]) for t in window]
        seen = regions[w] if any(shift) else [(0, 0)] * len(window)
        attended = attend(block.attn, torch.stack(entered), bias, seen)
        for place, t in enumerate(window):
            if t is None:
                continue
            y = flat[t] + (block.norm1(attended[place]) if behind else attended[place])
            out[t] = y + (block.norm2(block.mlp(y)) if behind else block.mlp(block.norm2(y)))
    return out.reshape(x.shape)


@torch.no_grad()
def run_swin(
    model: nn.Module, x: Tensor, ratios: Sequence[Sequence[float]]
) -> tuple[Tensor, dict[str, list[list[int]]]]:
    """Images x [B, 3, H, W] through timm's Swin (v1 or v2), whose blocks leave out the shares ratios[stage][block]
    of its windows. Returns the output and {block: windows computed of each image}.

    A stage is scored once, in front of its first block with a ratio: by the mean of |x| over channels.
    """
    chosen: dict[str, list[list[int]]] = {}
    outputs = []
    for image in x:
        hidden = model.patch_embed(image[None])
        for s, stage in enumerate(model.layers):
            hidden = stage.downsample(hidden)
            grid, activation = hidden[0], None
            for b, block in enumerate(stage.blocks):
                windows = windows_of(*grid.shape[:2], tuple(block.window_size), tuple(block.shift_size))
                kept = list(range(len(windows)))
                if ratios[s][b] > 0:
                    if activation is None:
                        activation = grid.abs().mean(-1).flatten()
                    count = max(1, int(len(windows) * (1 - ratios[s][b]) + 1e-6))
                    kept = best(importance(activation, windows), count)
                chosen.setdefault(f"layers.{s}.blocks.{b}", []).append(kept)
                grid = run_block(block, grid, kept)
            hidden = grid[None]
        outputs.append(model.head(model.norm(hidden)))
    return torch.cat(outputs), chosen
