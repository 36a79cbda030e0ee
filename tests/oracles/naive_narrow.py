"""Swin and Hiera whose MLPs run on what a method leaves of each window, one window of one image after the other.

Attention is the host's own weights by the definition (`naive_windows`); the methods are the oracles of plain image
towers, which see the tokens of a window as those of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from naive_vit import Place, Reduce, Token
from naive_windows import bias_of, regions_of, windows_of
from torch import Tensor, nn

# Of a window: its output [T, C], attention [H, T, T], queries, keys and values [H, T, d].
Attended = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    width = qkv.shape[1] // 3
    q, k, v = (qkv[:, i * width : (i + 1) * width].reshape(len(qkv), heads, -1).transpose(0, 1) for i in range(3))
    return q, k, v


def _mixed(proj: nn.Module, logits: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> Attended:
    attention = logits.softmax(-1)
    return proj((attention @ parts[2]).transpose(0, 1).flatten(1)), attention, parts


def attend_swin(block: nn.Module, x: Tensor, regions: list[tuple[int, int]]) -> Attended:
    """Of the tokens x [T, C] of one window of Swin (v1 or v2)."""
    attention = block.attn
    bias = torch.stack([torch.stack(row) for row in bias_of(attention, tuple(block.window_size))]).permute(2, 0, 1)
    apart = torch.tensor([[0.0 if a == b else -100.0 for b in regions] for a in regions], dtype=x.dtype)
    if hasattr(attention, "logit_scale"):
        rows = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
        q, k, v = _heads(x @ attention.qkv.weight.T + rows, attention.num_heads)
        q, k = (part / part.norm(dim=-1, keepdim=True).clamp_min(1e-12) for part in (q, k))
        logits = q @ k.transpose(1, 2) * attention.logit_scale.clamp(max=math.log(100)).exp()
    else:
        q, k, v = _heads(attention.qkv(x), attention.num_heads)
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return _mixed(attention.proj, logits + bias + apart, (q, k, v))


def attend_hiera(block: nn.Module, x: Tensor) -> Attended:
    """Of the tokens x [T, C] of one unit, or of the whole grid."""
    q, k, v = _heads(block.attn.qkv(x), block.attn.heads)
    return _mixed(block.attn.proj, q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), (q, k, v))


def through_mlp(
    y: Tensor,
    attended: Attended,
    number: int,
    reduce: Reduce,
    share: float,
    gained: Callable[[Tensor], Tensor],
) -> tuple[Tensor, int]:
    """The tokens y [T, C] of a window behind its MLP, and on how many that ran."""
    _, attention, (q, k, v) = attended
    tokens = [Token(y[j], (j,), j) for j in range(len(y))]
    keep = max(1, math.ceil(share * len(y) - 1e-6))
    place = Place(number, tokens, 0, False, attention.tolist(), k.tolist(), keep, v.tolist(), q.tolist())
    left, out = reduce(place), y.clone()
    for token in left:
        gain = gained(token.hidden)
        for member in token.members:
            out[member] = y[member] + gain
    return out, len(left)


@torch.no_grad()
def run_swin(model: nn.Module, x: Tensor, reduce: Reduce, share: float) -> tuple[Tensor, dict[str, int]]:
    """The output of images x [B, 3, H, W], and {block: tokens in its MLP, of all images}."""
    outputs, counts, number = [], {}, 0
    for image in x:
        hidden, number = model.patch_embed(image[None]), 0
        for s, stage in enumerate(model.layers):
            hidden = stage.downsample(hidden)
            for b, block in enumerate(stage.blocks):
                rows, columns = hidden.shape[1:3]
                size, shift = tuple(block.window_size), tuple(block.shift_size)
                flat = hidden.reshape(rows * columns, -1)
                behind, out = hasattr(block.attn, "logit_scale"), torch.empty_like(flat)
                regions = regions_of(rows, columns, size, shift)
                for w, window in enumerate(windows_of(rows, columns, size, shift)):
                    entered = flat[window] if behind else block.norm1(flat[window])
                    attended = attend_swin(block, entered, regions[w] if any(shift) else [(0, 0)] * len(window))
                    y = flat[window] + (block.norm1(attended[0]) if behind else attended[0])
                    out[window], count = through_mlp(
                        y, attended, number, reduce, share, _swin_mlp(block, behind=behind)
                    )
                    name = f"layers.{s}.blocks.{b}"
                    counts[name] = counts.get(name, 0) + count
                hidden, number = out.reshape(hidden.shape), number + 1
        outputs.append(model.head(model.norm(hidden)))
    return torch.cat(outputs), counts


def _swin_mlp(block: nn.Module, *, behind: bool) -> Callable[[Tensor], Tensor]:
    return (lambda h: block.norm2(block.mlp(h))) if behind else (lambda h: block.mlp(block.norm2(h)))


@torch.no_grad()
def run_hiera(model: nn.Module, x: Tensor, reduce: Reduce, share: float) -> tuple[Tensor, dict[str, int]]:
    """The same through timm's Hiera, whose blocks that pool run as they are."""
    outputs, counts = [], {}
    for one in model.unroll(model._pos_embed(model.patch_embed(x))):
        for i, block in enumerate(model.blocks):
            if block.attn.q_stride > 1:
                one = block(one[None])[0]
                continue
            places = model.reroll(torch.arange(len(one))[None, :, None], i)[0, :, :, 0]
            side = round(block.attn.window_size**0.5)
            size = (side, side) if block.attn.use_mask_unit_attn else tuple(places.shape)
            entered = block.norm1(one)
            passed = block.proj(entered) if block.do_expand else one
            out = torch.empty_like(passed)
            for window in windows_of(*places.shape, size, (0, 0)):
                own = places.flatten()[window]
                attended = attend_hiera(block, entered[own])
                y = passed[own] + block.ls1(attended[0])
                out[own], count = through_mlp(y, attended, i, reduce, share, _hiera_mlp(block))
                counts[f"blocks.{i}"] = counts.get(f"blocks.{i}", 0) + count
            one = out
        outputs.append(one)
    return model.forward_head(torch.stack(outputs)), counts


def _hiera_mlp(block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda h: block.ls2(block.mlp(block.norm2(h)))
