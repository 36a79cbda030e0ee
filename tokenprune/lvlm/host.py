"""What an adapter says about a vision-language model, and all that is known of it outside the adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord


@dataclass
class TowerCall:
    """One call of an image tower. bound: its arguments by name. output: what it returned. caught: kind -> what a tapped
    module put out, or was given (see `Scored.taps`)."""

    bound: Mapping[str, Any]
    output: Any
    caught: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A layer of the tower whose attention is looked at, the tower's `index`-th.

    taps: (kind, module) whose output is caught under that kind; a kind that ends in "_inputs" catches the keyword
    arguments. records: the call -> one record for each group of equally long images, in order, prefix tokens in front;
    before the tower has ended the call has no output, and "hidden" is caught, what the layer put out.
    """

    layer: nn.Module
    index: int
    taps: Sequence[tuple[str, nn.Module]]
    records: Callable[[TowerCall], list[AttentionRecord]]


@dataclass(frozen=True)
class LayerFacts:
    """A layer of the language model.

    queries, keys: (the layer, its input [B, T, C], rows of the rotary tables for these tokens or None) -> [B, H, T, D],
    out of the layer's own modules, turned where rows are given. scale: multiplies q.k. flash: whether its attention
    takes masks [B, T].
    """

    queries: Callable[[nn.Module, Tensor, Any], Tensor]
    keys: Callable[[nn.Module, Tensor, Any], Tensor]
    scale: float
    flash: bool


@dataclass(frozen=True)
class Crops:
    """How square crops of an image are encoded by themselves.

    side: of a crop in pixels. encode: normalised pixels [T, 3, side, side] -> [T, n, C], tokens of the language model,
    row by row. separator: [C] what ends a row of tokens, None for nothing. shrink: by how much more the sides of a
    crop's grid of tokens may be shrunk, 2 where each patch becomes a token. tokens: of an image that the model encodes
    itself, None where that depends on its size.
    """

    side: int
    encode: Callable[[Tensor], Tensor]
    separator: Tensor | None = None
    shrink: int = 1
    tokens: int | None = None


@dataclass
class LvlmHost:
    """One vision-language model.

    outer: the module that is called, with labels; model: the one in it that puts image features among the text's
    embeddings, and calls text, the language model. tower: called once for all images, and what it returns is handed
    down to `model` (`mm_encoder_outputs`) where images are encoded before. tokens: modality -> id of its placeholder.
    inputs: arguments of `model` that bring images. masks_first: whether `model` makes the masks [B, 1, Q, K] that text
    gets. layers: of text; layer: number of one -> its facts, None where tokens
    cannot leave between them. scored: (layer asked for, -1 the last, None the one whose output
    the language model gets) -> the facts, None where the tower's attention is not known. lift: (values [tiles, n, C] of
    the patches, the call) -> the same for the placeholders of each image, a list of [n_i, C]; None where packed.
    packs: class that is exchanged for `model`'s to see how patches of several tiles are packed, else None. projector:
    the module between tower and language model, None where the tower has it; plain: whether it is given features
    [images, n, C] of which each becomes a token. head: what makes logits. example: number of tokens -> text's arguments
    for a prompt of as many on the meta device. offers: "class token" and "text tower" (its twin, in whose space patches
    are), where the tower has them.
    tiles: the call -> patches of each tile, as [tiles, n]. grid: (placeholders of an image, its place among the images,
    the call) -> rows and columns, None where they fill none. window: of sliding attention in text, None without.
    refused: (bound arguments of `model`) -> why this call cannot be pruned, "" where it can. crops: how crops of an
    image are encoded by themselves, or why they cannot be.
    """

    outer: nn.Module
    model: nn.Module
    text: nn.Module
    tower: nn.Module
    tokens: Mapping[str, int]
    inputs: tuple[str, ...]
    masks_first: bool
    scored: Callable[[int | None], Scored | None]
    lift: Callable[[Tensor, TowerCall], list[Tensor]] | None
    tiles: Callable[[TowerCall], tuple[int, int]]
    grid: Callable[[int, int, TowerCall], tuple[int, int] | None]
    packs: type[nn.Module] | None = None
    projector: nn.Module | None = None
    plain: bool = False
    head: nn.Module | None = None
    example: Callable[[int], dict[str, Any]] | None = None
    offers: frozenset[str] = frozenset()
    layers: Sequence[nn.Module] = ()
    layer: Callable[[int], LayerFacts] | None = None
    window: int | None = None
    refused: Callable[[Mapping[str, Any]], str] = lambda bound: ""
    notes: list[str] = field(default_factory=list)
    crops: Callable[[], Crops] | str = "its crops are not known"


def square(tokens: int) -> tuple[int, int] | None:
    """(rows, columns) of a square grid of `tokens`, None where there is none."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None


def pooled(values: Tensor, groups: Callable[[Tensor], Tensor]) -> Tensor:
    """Means over the patches that share a placeholder: values [T, n, C] -> [T, n', C].

    groups: the host's own way from patches [T, n, 1] to placeholders [T, n', patches of each].
    """
    tiles, patches, channels = values.shape
    folded = values.transpose(1, 2).reshape(tiles * channels, patches, 1)
    means: Tensor = groups(folded).mean(-1)
    return means.view(tiles, channels, -1).transpose(1, 2)


def patch_ones(tiles: int, patches: int, like: Tensor) -> Tensor:
    """Ones [tiles, patches, 1]: marks what comes from the image when rows are packed with separators (zeros)."""
    return torch.ones(tiles, patches, 1, device=like.device, dtype=torch.float32)
