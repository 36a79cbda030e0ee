"""From what a block's attention puts out to the record that a method scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord


def image_heads(x: Tensor | None, heads: int, tokens: int, start: int) -> Tensor | None:
    """[B, H, N, D] of the image tokens, which begin at `start` of what a projection put out where it holds text too."""
    if x is None:
        return None
    x = split_heads(x, heads)
    start = 0 if x.shape[2] == tokens else start
    return x[:, :, start : start + tokens].detach()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H, N, D] of what a projection or a norm behind it put out."""
    if x.ndim == 3:
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
    return x.transpose(1, 2) if x.shape[2] == heads else x


def together(record: AttentionRecord, copies: int) -> AttentionRecord:
    """The record of each image once, its features those of all its copies side by side."""
    if copies == 1:
        return record

    def beside(x: Tensor) -> Tensor:
        return torch.cat(x.chunk(copies), -1)

    def each_rotated(x: Tensor) -> Tensor:
        assert record.rotate is not None
        return beside(record.rotate(torch.cat(x.chunk(copies, -1))))

    return replace(
        record,
        hidden=beside(record.hidden),
        origin=record.origin[: record.origin.shape[0] // copies],
        scale=record.scale / copies,
        queries=None if record.queries is None else beside(record.queries),
        keys=None if record.keys is None else beside(record.keys),
        rotate=None if record.rotate is None else each_rotated,
        cross=None,
    )


def grid_of(latents: tuple[int, int] | None, tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of the tokens, halved from the latents' as often as it takes; None where they fill no grid."""
    if latents is None:
        return None
    rows, columns = latents
    while rows * columns > tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return (rows, columns) if rows * columns == tokens else None
