"""What an adapter says about a model of which the MLPs run on fewer tokens of each window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenprune.windows.host import Layout
from tokenprune.windows.tiling import Grid, Tiling


@dataclass(frozen=True)
class Captured:
    """What the attention of W windows of T tokens in each of B images uses: queries, keys and values [B W, H, T, D]
    (None where the method needs none), bias [B W or 1, H, T, T] and the scale of q.k."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0


# (block, what the tap caught, tokens [W, T] of the windows, their grid, what the method needs) -> what attention uses.
Read = Callable[[nn.Module, Tensor, Tensor, Grid, frozenset[str]], Captured]


@dataclass
class NarrowBlock:
    """A block that attends within windows. span: from the first module that takes tokens one by one, and is given the
    hidden states [B, N, C], to the last. tap: the module whose output, or where `tap_input` whose input, `read` turns
    into queries, keys and values."""

    layout: Layout
    module: nn.Module
    span: tuple[nn.Module, nn.Module]
    tap: nn.Module
    read: Read
    tap_input: bool = False


@dataclass
class NarrowHost:
    """One model of `depth` blocks. entry: puts out the tokens of the first grid, [B, H, W, C] or, where that is always
    the same, [B, N, C]. grid: of the usual input, image: that of its tokens in the image, None where it is the same.
    example: batch -> input of the usual size. skipped: {block: why it is left alone}."""

    model: nn.Module
    blocks: list[NarrowBlock]
    depth: int
    entry: nn.Module
    grid: Grid
    example: Callable[[int], Tensor]
    image: Grid | None = None
    skipped: dict[str, str] = field(default_factory=dict)


def window_index(tiling: Tiling, grid: Grid, order: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """[W, T] the tokens of each window, row by row of the window in the image. order: see `Layout`."""
    index = tiling.index(grid, device)
    if order is None:
        return index
    place = torch.tensor(order, device=device).argsort()
    return index.gather(1, place[index].argsort(1))


def window_places(tiling: Tiling, grid: Grid, order: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """[N] for each token of the grid its position among those of `window_index`, flattened."""
    return window_index(tiling, grid, order, device).flatten().argsort()


def window_grid(layout: Layout, grid: Grid) -> Grid:
    """(rows, columns) of a window in the image."""
    if layout.order is None or layout.image is None:
        return layout.tiling.size
    place = torch.tensor(layout.order).argsort()[layout.tiling.index(grid, torch.device("cpu"))[0]]
    columns = layout.image[1]
    return len(set((place // columns).tolist())), len(set((place % columns).tolist()))
