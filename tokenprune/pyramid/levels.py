"""The dynamic image pyramid: an image at halved sizes, each cut into tiles of the side that the tower takes.

A level lies on a plane of rows x columns tiles. The image is enlarged until it touches the plane's border, from the
upper left corner on; what it leaves free is padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Tile = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Level:
    """halvings: of the image's sides. rows, columns: tiles of `side` pixels. height, width: pixels of the plane that
    the image covers."""

    halvings: int
    side: int
    rows: int
    columns: int
    height: int
    width: int

    def tiles(self) -> list[Tile]:
        """Every (row, column), row by row."""
        return [(row, column) for row in range(self.rows) for column in range(self.columns)]

    def content(self, tile: Tile) -> tuple[int, int]:
        """(width, height) in pixels of what a tile shows of the image; the rest of it is padding."""
        row, column = tile
        return min(self.side, self.width - column * self.side), min(self.side, self.height - row * self.side)

    def box(self, tile: Tile, size: tuple[int, int]) -> Box:
        """(left, upper, right, lower) of a tile in an image of size (width, height), in its pixels."""
        (row, column), (width, height) = tile, self.content(tile)
        across, down = size[0] / self.width, size[1] / self.height
        left, upper = column * self.side * across, row * self.side * down
        return left, upper, min(size[0], left + width * across), min(size[1], upper + height * down)


def pyramid(size: tuple[int, int], side: int, smallest: int = 3) -> list[Level]:
    """The levels of an image of size (width, height), the coarsest first: halved for as long as the longer side has
    `smallest` tiles at least (1008 pixels of tiles of 336 in the paper), and the image as it is. None where that fits
    into one tile.

    side: of a tile in pixels.
    """
    if max(size) <= side:
        return []
    halvings = [0]
    while max(size) >= (smallest * side) << (halvings[-1] + 1):
        halvings.append(halvings[-1] + 1)
    return [_level(size, side, times) for times in reversed(halvings)]


def _level(size: tuple[int, int], side: int, halvings: int) -> Level:
    width, height = size
    rows, columns = (-(-length // (side << halvings)) for length in (height, width))
    # The enlargement is the smaller of the two that fill the rows or the columns.
    full = rows * side * width <= columns * side * height
    # A fraction of a pixel in the last row or column of tiles is one, as each tile is read.
    return Level(
        halvings,
        side,
        rows,
        columns,
        rows * side if full else max((rows - 1) * side + 1, round(columns * side * height / width)),
        max((columns - 1) * side + 1, round(rows * side * width / height)) if full else columns * side,
    )


def tokens_of(level: Level, tiles: Iterable[Tile], grid: int) -> list[Tile]:
    """(row, column) of every token of these tiles, grid x grid each, among the tokens of the whole level, row by row;
    tokens of padding are left out."""
    found = [
        (row * grid + i, column * grid + j)
        for row, column in tiles
        for i in range(grid)
        for j in range(grid)
        if (row * grid + i) * level.side < grid * level.height and (column * grid + j) * level.side < grid * level.width
    ]
    return sorted(found)


def tiles_under(tokens: Iterable[Tile], level: Level, finer: Level, grid: int) -> list[Tile]:
    """Tiles of the next level in which tokens of this one lie, by their upper left corners, row by row.

    Where neither level is padded this is the paper's floor(position * tiles of the next level / tokens of this one);
    padding shifts that, as levels have different amounts of it.
    """
    return sorted(
        {
            (row * finer.height // (grid * level.height), column * finer.width // (grid * level.width))
            for row, column in tokens
        }
    )
