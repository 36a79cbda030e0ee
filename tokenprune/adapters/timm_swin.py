"""timm's Swin and Swin v2: windows are computed or passed through."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2
from timm.models._features import FeatureDictNet
from torch import Tensor, nn

from tokenprune.adapters.swapping import named_as
from tokenprune.adapters.timm_windows import Windowed, example_of, swapped_for
from tokenprune.registry import register_adapter
from tokenprune.windows.here import attended_here, windows_here
from tokenprune.windows.host import Block, Layout, WindowsHost
from tokenprune.windows.tiling import Chosen, Grid, Tiling


@named_as(swin_transformer.SwinTransformerBlock)
class WindowedSwinBlock(swin_transformer.SwinTransformerBlock):
    """Swin's block, normalised in front of attention and MLP: padding is zero behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = windows_here(x, _tiling(self))
        if chosen is None:
            out: Tensor = super().forward(x)
            return out
        windows = chosen.take(x)
        attended = self.attn(chosen.blank(self.norm1(windows)), mask=_mask(self, x, chosen))
        images = chosen.together(windows) + self.drop_path1(chosen.together(attended))
        attended_here()
        images = images + self.drop_path2(self.mlp(self.norm2(images)))
        return chosen.give_back(images, x)


@named_as(swin_transformer_v2.SwinTransformerV2Block)
class WindowedSwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """Swin v2's block, normalised behind attention and MLP: padding is zero in front of the attention."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = windows_here(x, _tiling(self))
        if chosen is None:
            out: Tensor = super().forward(x)
            return out
        windows = chosen.take(x)
        attended = self.attn(windows, mask=_mask(self, x, chosen))
        images = chosen.together(windows) + self.drop_path1(self.norm1(chosen.together(attended)))
        attended_here()
        images = images + self.drop_path2(self.norm2(self.mlp(images)))
        return chosen.give_back(images, x)


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: WindowedSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: WindowedSwinV2Block,
}


_STAGES = (swin_transformer.SwinTransformerStage, swin_transformer_v2.SwinTransformerV2Stage)


def _stages(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _STAGES)]


def _tiling(block: Any) -> Tiling:
    return Tiling(tuple(block.window_size), tuple(block.shift_size))


def _mask(block: Any, x: Tensor, chosen: Chosen) -> Tensor | None:
    """[B K, T, T] what keeps tokens apart that have met by rolling the grid, None where it is not rolled."""
    tiling, grid = _tiling(block), (x.shape[1], x.shape[2])
    if not any(tiling.shift):
        return None
    if getattr(block, "dynamic_mask", False):
        sides = (tiles * side for tiles, side in zip(tiling.tiles(grid), tiling.size, strict=True))
        return chosen.rows(block.get_attn_mask(x.new_empty(1, *sides, 1)))
    return chosen.rows(block.attn_mask)


@register_adapter
class TimmSwin(Windowed):
    """See `tokenprune.family.Family`."""

    name = "timm_swin"
    models = (swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2)

    def find(self, target: object) -> nn.Module | None:
        """A Swin, or what timm takes apart for its feature maps (features_only=True)."""
        found = super().find(target)
        assert isinstance(target, nn.Module)
        lists = (module for module in target.modules() if isinstance(module, FeatureDictNet) and _stages(module))
        return found if found is not None else next(lists, None)

    @staticmethod
    def describe(model: nn.Module) -> WindowsHost:
        """The facts of a Swin."""
        parts: Any = model
        blocks: list[Block] = []
        scale = 1
        for s, (name, stage) in enumerate(_stages(model)):
            scale *= 1 if isinstance(stage.downsample, nn.Identity) else 2
            for b, block in enumerate(stage.blocks):
                layout = Layout(f"{name}.blocks.{b}", len(blocks), s, (scale, scale), _tiling(block))
                blocks.append(Block(layout, block, swapped_for(block, _SWAPPED)))
        rows, columns = parts.patch_embed.grid_size
        return WindowsHost(
            model=model,
            blocks=blocks,
            depth=len(blocks),
            entry=parts.patch_embed,
            grid=(rows, columns),
            example=example_of(model, parts.patch_embed.img_size),
            check=_small,
        )


def _small(block: nn.Module) -> tuple[int, ...]:
    """A grid of two windows, one below the other, with padding in both."""
    parts: Any = block
    rows, columns = parts.window_size
    grid: Grid = rows + 1, max(1, columns - 1)
    parts.set_input_size(feat_size=grid, window_size=(rows, columns), always_partition=True)
    return 1, *grid, parts.attn.qkv.in_features
