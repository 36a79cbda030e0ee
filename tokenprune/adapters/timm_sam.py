"""timm's SAM and ViTDet-style encoders: blocks of windows between blocks that look at the whole grid."""

from __future__ import annotations

from typing import Any

from timm.models import vision_transformer_sam
from torch import Tensor, nn

from tokenprune.adapters.swapping import named_as
from tokenprune.adapters.timm_windows import Windowed, example_of, swapped_for
from tokenprune.errors import UnsupportedMethod
from tokenprune.narrow.host import NarrowHost
from tokenprune.registry import register_adapter
from tokenprune.windows.here import on_windows_here
from tokenprune.windows.host import Block, Layout, WindowsHost
from tokenprune.windows.tiling import Chosen, Tiling


@named_as(vision_transformer_sam.Block)
class WindowedSamBlock(vision_transformer_sam.Block):
    """SAM's block: padding is zero behind the norm in front of its attention."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(chosen: Chosen, windows: Tensor) -> Tensor:
            squares = chosen.blank(self.norm1(windows)).view(-1, self.window_size, self.window_size, x.shape[-1])
            # The host drops paths of windows, not of images.
            attended = self.drop_path1(self.ls1(self.attn(squares))).flatten(1, 2)
            return chosen.together(windows + attended)

        def feed(tokens: Tensor) -> Tensor:
            return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))

        out = on_windows_here(x, _tiling(self), attend, feed)
        return super().forward(x) if out is None else out


def _tiling(block: Any) -> Tiling:
    return Tiling((block.window_size, block.window_size))


@register_adapter
class TimmSam(Windowed):
    """See `tokenprune.family.Family`."""

    name = "timm_sam"
    models = (vision_transformer_sam.VisionTransformerSAM,)

    @staticmethod
    def describe(model: nn.Module) -> WindowsHost:
        """The facts of an encoder; blocks of windows without a whole one between them are a stage."""
        parts: Any = model
        blocks: list[Block] = []
        skipped, stage = {}, 0
        for i, block in enumerate(parts.blocks):
            swapped = swapped_for(block, {vision_transformer_sam.Block: WindowedSamBlock})
            if block.window_size > 0:
                layout = Layout(f"blocks.{i}", i, stage, (1, 1), _tiling(block))
                blocks.append(Block(layout, block, swapped, block.attn.qkv.in_features))
                continue
            skipped[f"blocks.{i}"] = "left alone: its attention is of the whole grid"
            stage = blocks[-1].layout.stage + 1 if blocks else 0
        rows, columns = parts.patch_embed.grid_size
        return WindowsHost(
            model=model,
            blocks=blocks,
            depth=len(parts.blocks),
            entry=parts.patch_embed,
            grid=(rows, columns),
            example=example_of(model, parts.patch_embed.img_size),
            check=_small,
            outside=not skipped,
            skipped=skipped,
        )

    @staticmethod
    def describe_tokens(model: nn.Module) -> NarrowHost:
        """None: its windows do not divide the grid of any usual size, and so hold padding."""
        raise UnsupportedMethod(
            f"windows of {type(model).__name__} hold padding, in which no method for tokens chooses; 'sparsevit',"
            " 'random' and 'uniform' leave out whole windows"
        )


def _small(block: nn.Module) -> tuple[int, ...]:
    """A grid of two windows, one below the other, with padding in both."""
    parts: Any = block
    return 1, parts.window_size + 1, max(1, parts.window_size - 1), parts.attn.qkv.in_features
