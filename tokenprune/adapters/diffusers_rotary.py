"""Rotary embeddings as diffusers' attentions apply them: from a block's argument to the rotation of its image tokens.

Each function takes (the argument's value, image tokens N, heads H) and gives cosines and sines that broadcast to
[B, H, N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Tables = Callable[[Any, int, int], tuple[Tensor, Tensor]]
Rotate = Callable[[Tensor], Tensor]


def last_rows(table: Any, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    """Tables [N, D], or [T + N, D] with the text in front."""
    cos, sin = table
    return cos[-tokens:], sin[-tokens:]


def rows_by_head(table: Any, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    """Tables [1, N, 1, D]."""
    cos, sin = table
    return cos.transpose(1, 2), sin.transpose(1, 2)


def whole_width(table: Any, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    """Tables [B, N, H D]."""
    cos, sin = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in table)
    return cos, sin


def complex_rows(table: Any, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    """(image [N, D / 2] of complex numbers, text)."""
    image = table[0]
    return image.real.repeat_interleave(2, -1), image.imag.repeat_interleave(2, -1)


def rotation(tables: Tables, halves: bool, value: Any, tokens: int, heads: int) -> Rotate | None:
    """The rotation of queries and keys [B, H, N, D]; None where the block was given no embedding. halves: whether a
    pair of channels is (d, d + D / 2), else it is (2 d, 2 d + 1)."""
    if value is None:
        return None
    cos, sin = tables(value, tokens, heads)
    return partial(rotate, cos=cos, sin=sin, halves=halves)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """x [..., N, D] with each pair of channels turned."""
    if halves:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return (x.float() * cos.to(x.device) + turned.float() * sin.to(x.device)).to(x.dtype)
