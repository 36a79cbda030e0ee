"""timm's Swin and Swin v2, and networks of their stages: windows are computed or passed through."""

from __future__ import annotations

import math
from typing import Any

from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.adapters.swapping import named_as
from tokenprune.adapters.timm_windows import Windowed, example_of, swapped_for
from tokenprune.errors import UnsupportedModel
from tokenprune.narrow.host import Captured, NarrowBlock, NarrowHost
from tokenprune.registry import register_adapter
from tokenprune.windows.here import on_windows_here
from tokenprune.windows.host import Block, Layout, WindowsHost
from tokenprune.windows.tiling import Chosen, Grid, Tiling


@named_as(swin_transformer.SwinTransformerBlock)
class WindowedSwinBlock(swin_transformer.SwinTransformerBlock):
    """Swin's block, normalised in front of attention and MLP: padding is zero behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(chosen: Chosen, windows: Tensor) -> Tensor:
            attended = self.attn(chosen.blank(self.norm1(windows)), mask=_mask(self, x, chosen))
            return chosen.together(windows) + self.drop_path1(chosen.together(attended))

        def feed(tokens: Tensor) -> Tensor:
            return tokens + self.drop_path2(self.mlp(self.norm2(tokens)))

        out = on_windows_here(x, _tiling(self), attend, feed)
        return super().forward(x) if out is None else out


@named_as(swin_transformer_v2.SwinTransformerV2Block)
class WindowedSwinV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """Swin v2's block, normalised behind attention and MLP: padding is zero in front of the attention."""

    def forward(self, x: Tensor) -> Tensor:
        def attend(chosen: Chosen, windows: Tensor) -> Tensor:
            attended = self.attn(windows, mask=_mask(self, x, chosen))
            return chosen.together(windows) + self.drop_path1(self.norm1(chosen.together(attended)))

        def feed(tokens: Tensor) -> Tensor:
            return tokens + self.drop_path2(self.norm2(self.mlp(tokens)))

        out = on_windows_here(x, _tiling(self), attend, feed)
        return super().forward(x) if out is None else out


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: WindowedSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: WindowedSwinV2Block,
}


_STAGES = (swin_transformer.SwinTransformerStage, swin_transformer_v2.SwinTransformerV2Stage)


def _stages(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _STAGES)]


def _embeds(module: nn.Module) -> bool:
    """Whether it has a patch embedding that says its grid and the size of its images."""
    embedding = getattr(module, "patch_embed", None)
    return all(hasattr(embedding, name) for name in ("grid_size", "img_size", "proj"))


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
        """A Swin, or what else holds its stages and has a patch embedding like its own: what timm takes apart for its
        feature maps (features_only=True), or a network of somebody's for another task."""
        found = super().find(target)
        assert isinstance(target, nn.Module)
        others = (module for module in target.modules() if _embeds(module) and _stages(module))
        return found if found is not None else next(others, None)

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
                blocks.append(Block(layout, block, swapped_for(block, _SWAPPED), block.dim))
        rows, columns = parts.patch_embed.grid_size
        return WindowsHost(
            model=model,
            blocks=blocks,
            depth=len(blocks),
            entry=parts.patch_embed,
            grid=(rows, columns),
            example=example_of(model, parts.patch_embed.img_size),
            check=_small,
            dense=not isinstance(model, TimmSwin.models),
        )

    @staticmethod
    def describe_tokens(model: nn.Module) -> NarrowHost:
        """The facts of a Swin of which the MLPs run on fewer tokens."""
        host = TimmSwin.describe(model)
        blocks = [_narrow(block.layout, block.module) for block in host.blocks]
        return NarrowHost(model, blocks, host.depth, host.entry, host.grid, host.example)


def _narrow(layout: Layout, block: Any) -> NarrowBlock:
    if isinstance(block, swin_transformer_v2.SwinTransformerV2Block):  # its attention does not run `qkv`
        return NarrowBlock(layout, block, (block.mlp, block.norm2), block.attn, read_swin_v2, tap_input=True)
    return NarrowBlock(layout, block, (block.norm2, block.mlp), block.attn.qkv, read_swin)


def read_swin(block: Any, caught: Tensor, index: Tensor, grid: Grid, needs: frozenset[str]) -> Captured:
    """From the output [B W, T, 3 C] of `qkv`."""
    attention = block.attn
    _check_windows(caught, index)
    q, k, v = caught.view(*caught.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    bias = None
    if "queries" in needs:
        bias = _apart(block, attention._get_rel_pos_bias(), grid, caught.shape[0] // index.shape[0])
    return Captured(q, k, v, bias, attention.scale)


def read_swin_v2(block: Any, caught: Tensor, index: Tensor, grid: Grid, needs: frozenset[str]) -> Captured:
    """From the input [B W, T, C] of the attention, whose logits are cosines: those of queries and keys as they are
    used, queries times the logits' scale."""
    attention = block.attn
    _check_windows(caught, index)
    found: dict[str, Tensor] = {}
    for number, kind in enumerate(("queries", "keys", "values")):
        if kind in needs:
            rows = slice(number * attention.dim, (number + 1) * attention.dim)
            bias = (attention.q_bias, attention.k_bias, attention.v_bias)[number]
            heads = functional.linear(caught, attention.qkv.weight[rows], bias)
            found[kind] = heads.view(*heads.shape[:2], attention.num_heads, -1).transpose(1, 2)
            if kind != "values":
                found[kind] = functional.normalize(found[kind], dim=-1)
    queries, keys, values = (found.get(kind) for kind in ("queries", "keys", "values"))
    if queries is None:
        return Captured(None, keys, values)
    queries = queries * attention.logit_scale.clamp(max=math.log(100.0)).exp()
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
    area = index.shape[1]
    bias = 16 * table[attention.relative_position_index.flatten()].view(area, area, -1).permute(2, 0, 1).sigmoid()
    bias = _apart(block, bias.unsqueeze(0), grid, caught.shape[0] // index.shape[0])
    return Captured(queries, keys, values, bias)


def _check_windows(caught: Tensor, index: Tensor) -> None:
    if caught.shape[1] != index.shape[1] or caught.shape[0] % index.shape[0]:
        raise UnsupportedModel(
            "the windows of this model have changed since it was patched (set_input_size?); patch the model again"
        )


def _apart(block: Any, bias: Tensor, grid: Grid, images: int) -> Tensor:
    """bias [1, H, T, T] with what keeps tokens apart that have met by rolling the grid: [1 or B W, H, T, T]."""
    if not any(block.shift_size):
        return bias
    dynamic = getattr(block, "dynamic_mask", False)
    mask = block.get_attn_mask(bias.new_empty(1, *grid, 1)) if dynamic else block.attn_mask
    return (bias + mask.unsqueeze(1)).repeat(images, 1, 1, 1)


def _small(block: nn.Module) -> tuple[int, ...]:
    """A grid of two windows, one below the other, with padding in both."""
    parts: Any = block
    rows, columns = parts.window_size
    grid: Grid = rows + 1, max(1, columns - 1)
    parts.set_input_size(feat_size=grid, window_size=(rows, columns), always_partition=True)
    return 1, *grid, parts.attn.qkv.in_features
