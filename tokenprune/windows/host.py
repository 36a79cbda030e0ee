"""What an adapter says about a model of windows, and all that is known of it outside the adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from tokenprune.windows.tiling import Grid, Tiling


@dataclass(frozen=True)
class Layout:
    """A block of windows, as plain data. name: of the module. number: in a schedule. stage: blocks of one stage are
    scored together. scale: its grid has the sides of the first one divided by those, rounded up. order: where a grid is
    not that of the image, which of its tokens lies at each place of `image`, row by row."""

    name: str
    number: int
    stage: int
    scale: Grid
    tiling: Tiling
    order: tuple[int, ...] | None = None
    image: Grid | None = None

    def grid(self, first: Grid) -> Grid:
        """Its grid in a model whose first grid is that."""
        return -(-first[0] // self.scale[0]), -(-first[1] // self.scale[1])

    def windows(self, first: Grid) -> int:
        """Its windows."""
        return self.tiling.windows(self.grid(first))

    def tokens(self, first: Grid) -> int:
        """Its tokens."""
        rows, columns = self.grid(first)
        return rows * columns


@dataclass
class Block:
    """A block of windows. swapped: its class, with the windows that it computes taken out and put back. width: channels
    of the tokens that enter."""

    layout: Layout
    module: nn.Module
    swapped: type[nn.Module]
    width: int


@dataclass
class WindowsHost:
    """One model of `depth` blocks, some of windows. entry: puts out the tokens of the first grid, [B, H, W, C] or,
    where that is always the same, [B, N, C]. grid: of the usual input; image: that of its tokens in the image, None
    where it is the same. example: batch -> input of that size. check: a copy of a block -> the shape of an input of a
    few windows, which it is made to take. outside: whether what runs between the blocks costs in proportion
    to the tokens there. dense: whether what runs behind the last does. skipped: {block: why it is left alone}."""

    model: nn.Module
    blocks: list[Block]
    depth: int
    entry: nn.Module
    grid: Grid
    example: Callable[[int], Tensor]
    check: Callable[[nn.Module], tuple[int, ...]]
    image: Grid | None = None
    outside: bool = True
    dense: bool = False
    num_prefix_tokens: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
