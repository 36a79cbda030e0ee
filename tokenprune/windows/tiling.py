"""How a grid of tokens is divided into windows, and what is taken from the chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction

Grid = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """Windows of `size` (rows, columns) of a grid that is first rolled up and to the left by `shift` and then, where
    its sides are no multiples, padded at their ends."""

    size: Grid
    shift: Grid = (0, 0)

    @property
    def area(self) -> int:
        """Tokens of a window, T."""
        return self.size[0] * self.size[1]

    def tiles(self, grid: Grid) -> Grid:
        """(rows, columns) of windows."""
        return -(-grid[0] // self.size[0]), -(-grid[1] // self.size[1])

    def windows(self, grid: Grid) -> int:
        """Number of windows, W."""
        rows, columns = self.tiles(grid)
        return rows * columns

    def padded(self, grid: Grid) -> bool:
        """Whether windows hold padding."""
        return self.windows(grid) * self.area > grid[0] * grid[1]

    def index(self, grid: Grid, device: torch.device) -> Tensor:
        """[W, T] the token of the grid, row by row, at each place of each window; their number where it is padding."""
        rows, columns = self.tiles(grid)
        tokens = torch.arange(grid[0] * grid[1], device=device).view(grid)
        if any(self.shift):
            tokens = tokens.roll((-self.shift[0], -self.shift[1]), (0, 1))
        down, across = rows * self.size[0] - grid[0], columns * self.size[1] - grid[1]
        tokens = functional.pad(tokens, (0, across, 0, down), value=grid[0] * grid[1])
        return tokens.view(rows, self.size[0], columns, self.size[1]).transpose(1, 2).reshape(-1, self.area)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The windows that a block computes. windows: [B, K] which. area: T. tokens: the reduction to their tokens, window
    by window. padding: [B, K T] which of those are padding, None where there is none in any window. packed: whether
    each image computes a number of its own, and all lie one behind another as one image, B = 1. alive: [B, K] masks, in
    a training forward that computes all windows: of one with a zero the tokens are those that entered."""

    windows: Tensor
    area: int
    tokens: Reduction
    padding: Tensor | None
    packed: bool = False
    alive: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to the tokens of each window, [B K, T, C], padding as zeros."""
        return self.apart(self.tokens(self._tokens(x)))

    def blank(self, windows: Tensor) -> Tensor:
        """[B K, T, C] with zeros in the place of padding, as hosts pad behind a norm."""
        if self.padding is None:
            return windows
        return windows.masked_fill(self.padding.view(-1, self.area, 1), 0.0)

    def rows(self, table: Tensor) -> Tensor:
        """What a table [W, ...] of all windows has for each computed one, [B K, ...]."""
        return gather(table.unsqueeze(0), self.windows).flatten(0, 1)

    def together(self, windows: Tensor) -> Tensor:
        """[B K, T, C] as images, [B, K T, C]."""
        return windows.reshape(self.windows.shape[0], -1, windows.shape[-1])

    def apart(self, images: Tensor) -> Tensor:
        """[B, K T, C] as windows, [B K, T, C]."""
        return images.reshape(-1, self.area, images.shape[-1])

    def give_back(self, images: Tensor, x: Tensor) -> Tensor:
        """x [B, H, W, C] with the computed tokens [B, K T, C] in their places; the others keep every bit."""
        full = self._tokens(x.to(images.dtype))
        if self.alive is not None:
            alive = self.alive.to(images.dtype).repeat_interleave(self.area, 1).unsqueeze(-1)
            images = alive * images + (1 - alive) * self.tokens(full)
        full = self.tokens.bring_back(images, images, full)
        return full.view(x.shape[0], -1, x.shape[3])[:, : x.shape[1] * x.shape[2]].reshape(x.shape)

    def computed(self, images: int, count: int) -> Tensor:
        """Which of the `count` tokens of each of the `images` it computes, [images, count]."""
        each = count + (self.padding is not None)
        found = torch.zeros(len(self.tokens.kept), images * each // len(self.tokens.kept), dtype=torch.bool)
        found = found.to(self.windows.device).scatter(1, self.tokens.kept, True)
        return found.view(images, each)[:, :count]

    def _tokens(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        if self.padding is not None:
            tokens = functional.pad(tokens, (0, 0, 0, 1))  # one that padding is read from
        return tokens.reshape(1, -1, tokens.shape[2]) if self.packed else tokens


def choose(tiling: Tiling, grid: Grid, index: Tensor, windows: Tensor) -> Chosen:
    """The `windows` [B, K] of a grid, whose tokens are index [W, T] (see `Tiling.index`)."""
    tokens = gather(index.unsqueeze(0), windows).flatten(1)
    padding = tokens == grid[0] * grid[1] if tiling.padded(grid) else None
    return Chosen(windows, tiling.area, Reduction(tokens), padding)


def choose_packed(tiling: Tiling, grid: Grid, index: Tensor, kept: Tensor) -> Chosen:
    """The windows of each image where `kept` [B, W] is true, as `choose`."""
    image, window = kept.nonzero(as_tuple=True)
    count, padded = grid[0] * grid[1], tiling.padded(grid)
    tokens = index[window]
    places = tokens + image.unsqueeze(1) * (count + padded)
    padding = (tokens == count).view(1, -1) if padded else None
    return Chosen(window[None], tiling.area, Reduction(places.view(1, -1)), padding, packed=True)
