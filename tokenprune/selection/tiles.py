"""A grid cut in tiles, each with its share of the destinations, as tables that follow from the shapes alone."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.tables import table

Grid = tuple[int, int]


class Tiling(NamedTuple):
    """down x across tiles of a grid, as equal as it goes, one row of tiles after the other. quotas: destinations in
    each."""

    grid: Grid
    down: int
    across: int
    quotas: tuple[int, ...]

    def members(self, like: Tensor) -> Tensor:
        """[T m] positions of the tokens of each tile; a smaller one repeats its first."""
        return table(_members, self.grid, self.down, self.across, like=like)

    def outside(self, like: Tensor) -> Tensor:
        """[T, m] whether `members` repeats there."""
        return table(_outside, self.grid, self.down, self.across, like=like)

    def slots(self, like: Tensor) -> Tensor:
        """[n] where each token of the grid stands among the T m members."""
        return table(_slots, self.grid, self.down, self.across, like=like)

    def rows(self, like: Tensor) -> Tensor:
        """[K] the destinations among the T k that there are if every tile has the largest quota, k."""
        return table(_rows, self.quotas, like=like)

    def filled(self, like: Tensor) -> Tensor:
        """[T k] a destination's number for each of those; where a tile has fewer, its last."""
        return table(_filled, self.quotas, like=like)


def cut(grid: Grid, keep: int, tiles: int) -> Tiling:
    """The grid in tiles x tiles parts with `keep` destinations in proportion to their sizes; in fewer where there would
    be a tile without one."""
    for side in range(tiles, 0, -1):
        down, across = min(side, grid[0]), min(side, grid[1])
        ends, done = [0], 0
        for top, bottom in pairwise(_edges(grid[0], down)):
            for left, right in pairwise(_edges(grid[1], across)):
                done += (bottom - top) * (right - left)
                ends.append(keep * done // (grid[0] * grid[1]))
        quotas = tuple(after - before for before, after in pairwise(ends))
        if all(quotas):
            break
    return Tiling(grid, down, across, quotas)


def _edges(length: int, parts: int) -> list[int]:
    return [i * length // parts for i in range(parts + 1)]


def _positions(grid: Grid, down: int, across: int) -> list[list[int]]:
    return [
        [row * grid[1] + column for row in range(top, bottom) for column in range(left, right)]
        for top, bottom in pairwise(_edges(grid[0], down))
        for left, right in pairwise(_edges(grid[1], across))
    ]


def _members(grid: Grid, down: int, across: int, device: torch.device) -> Tensor:
    parts = _positions(grid, down, across)
    most = max(map(len, parts))
    return torch.tensor([p for part in parts for p in part + part[:1] * (most - len(part))], device=device)


def _outside(grid: Grid, down: int, across: int, device: torch.device) -> Tensor:
    sizes = [len(part) for part in _positions(grid, down, across)]
    return torch.tensor([[place >= size for place in range(max(sizes))] for size in sizes], device=device)


def _slots(grid: Grid, down: int, across: int, device: torch.device) -> Tensor:
    parts = _positions(grid, down, across)
    most = max(map(len, parts))
    slots = {p: tile * most + place for tile, part in enumerate(parts) for place, p in enumerate(part)}
    return torch.tensor([slots[p] for p in range(len(slots))], device=device)


def _rows(quotas: tuple[int, ...], device: torch.device) -> Tensor:
    k = max(quotas)
    return torch.tensor([tile * k + i for tile, quota in enumerate(quotas) for i in range(quota)], device=device)


def _filled(quotas: tuple[int, ...], device: torch.device) -> Tensor:
    k, before, filled = max(quotas), 0, list[int]()
    for quota in quotas:
        filled += [before + min(i, quota - 1) for i in range(k)]
        before += quota
    return torch.tensor(filled, device=device)
