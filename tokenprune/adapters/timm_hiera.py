"""timm's Hiera: blocks whose attention stays in mask units.

Hiera's tokens are unrolled: the first ones of all units, then the second ones. Seen as a grid whose rows are places in
a unit and whose columns are units, a unit is a window of one column. Blocks that pool or look at all units stay whole.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import hiera
from torch import Tensor, nn

from tokenprune.adapters.swapping import named_as
from tokenprune.adapters.timm_windows import Windowed, example_of, swapped_for
from tokenprune.errors import UnsupportedModel
from tokenprune.narrow.host import Captured, NarrowBlock, NarrowHost
from tokenprune.registry import register_adapter
from tokenprune.windows.here import on_windows_here
from tokenprune.windows.host import Block, Layout, WindowsHost
from tokenprune.windows.tiling import Chosen, Grid, Tiling


@named_as(hiera.HieraBlock)
class WindowedHieraBlock(hiera.HieraBlock):
    """Hiera's block without pooling."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(chosen: Chosen, windows: Tensor) -> Tensor:
            attended = self.attn(self.norm1(windows))
            return chosen.together(windows) + self.drop_path1(self.ls1(chosen.together(attended)))

        def feed(tokens: Tensor) -> Tensor:
            return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))

        units = x.unflatten(1, (self.attn.window_size, -1))  # type: ignore[no-untyped-call]
        out = on_windows_here(units, Tiling((self.attn.window_size, 1)), attend, feed)
        return super().forward(x) if out is None else out.flatten(1, 2)


@register_adapter
class TimmHiera(Windowed):
    """See `tokenprune.family.Family`."""

    name = "timm_hiera"
    models = (hiera.Hiera,)

    @staticmethod
    def describe(model: nn.Module) -> WindowsHost:
        """The facts of a Hiera."""
        parts: Any = model
        if len(parts.tokens_spatial_shape) != 2:
            raise UnsupportedModel("this Hiera takes videos; only those that take images are known")
        rows, columns = parts.tokens_spatial_shape
        units = rows * columns // parts.mu_size
        blocks: list[Block] = []
        skipped, stage, grid = {}, 0, (rows, columns)
        for i, block in enumerate(parts.blocks):
            name, attention = f"blocks.{i}", block.attn
            swapped = swapped_for(block, {hiera.HieraBlock: WindowedHieraBlock})
            if attention.q_stride > 1:
                skipped[name] = "left alone: it pools its queries"
                stage, grid = stage + 1, (grid[0] // parts.q_stride[0], grid[1] // parts.q_stride[1])
            elif not attention.use_mask_unit_attn:
                skipped[name] = "left alone: its attention is of the whole grid"
            elif block.do_expand:
                skipped[name] = "left alone: it changes the number of channels"
            else:
                scale = parts.mu_size // attention.window_size, 1
                order = _order(parts.reroll, i, grid)
                tiling = Tiling((attention.window_size, 1))
                layout = Layout(name, i, stage, scale, tiling, order, grid)
                blocks.append(Block(layout, block, swapped, block.attn.qkv.in_features))
        size = tuple(side * stride for side, stride in zip((rows, columns), parts.patch_stride, strict=True))
        return WindowsHost(
            model=model,
            blocks=blocks,
            depth=len(parts.blocks),
            entry=parts.patch_embed,
            grid=(parts.mu_size, units),
            image=(rows, columns),
            example=example_of(model, size),
            check=_small,
            skipped=skipped,
        )

    @staticmethod
    def describe_tokens(model: nn.Module) -> NarrowHost:
        """The facts of a Hiera of which the MLPs run on fewer tokens: of each unit, or of the whole grid."""
        host = TimmHiera.describe(model)
        parts: Any = model
        rows, columns = parts.tokens_spatial_shape
        units = {block.layout.number: block.layout for block in host.blocks}
        blocks: list[NarrowBlock] = []
        skipped, stage, grid = {}, 0, (rows, columns)
        for i, block in enumerate(parts.blocks):
            name, attention = f"blocks.{i}", block.attn
            if attention.q_stride > 1:
                stage, grid = stage + 1, (grid[0] // parts.q_stride[0], grid[1] // parts.q_stride[1])
                skipped[name] = host.skipped[name]
                continue
            layout = units.get(i)
            if layout is None:
                scale = rows * columns // (grid[0] * grid[1]), 1
                unrolled = parts.mu_size // scale[0], host.grid[1]
                layout = Layout(name, i, stage, scale, Tiling(unrolled), _order(parts.reroll, i, grid), grid)
            blocks.append(NarrowBlock(layout, block, (block.norm2, block.mlp), attention.qkv, read_hiera))
        return NarrowHost(
            model, blocks, host.depth, host.entry, host.grid, host.example, image=host.image, skipped=skipped
        )


def read_hiera(block: Any, caught: Tensor, index: Tensor, grid: Grid, needs: frozenset[str]) -> Captured:
    """From the output [B, N, 3 C] of `qkv`, in the order of the tokens."""
    attention = block.attn
    windows = caught.index_select(1, index.flatten()).reshape(
        -1, index.shape[1], 3, attention.heads, attention.head_dim
    )
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)
    return Captured(q, k, v, scale=attention.scale)


def _order(reroll: Any, index: int, grid: Grid) -> tuple[int, ...]:
    """The unrolled token at each place of the image's grid in front of a block."""
    tokens = torch.arange(grid[0] * grid[1], device="cpu").view(1, -1, 1)
    return tuple(reroll(tokens, index).flatten().tolist())


def _small(block: nn.Module) -> tuple[int, ...]:
    """Two units."""
    parts: Any = block
    return 1, 2 * parts.attn.window_size, parts.attn.qkv.in_features
