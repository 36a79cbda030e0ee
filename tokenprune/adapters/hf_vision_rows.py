"""transformers' image towers that take all images of a call in one row: those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Their patches lie in the order of the 2 x 2 groups that are merged behind the last layer, in Qwen2.5-VL of windows
besides, each frame of a video by itself.
"""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapters.hf_vision_blocks import asked_layers, refused_in_towers, takes_bias
from tokenprune.adapters.hf_vision_row_blocks import BiasedRowAttention, MidRowLayer, RowLayer
from tokenprune.adapters.swapping import mixed
from tokenprune.errors import unknown_module
from tokenprune.host import BlockHost, Caught, Host, Stretch

ROW_TOWERS = {
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": "Qwen2VLVisionBlock",
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": "Qwen2_5_VLVisionBlock",
    "qwen3_vl.Qwen3VLVisionModel": "Qwen3VLVisionBlock",
}
"""Towers that are known, and their layers."""
_SIDE = 32  # patches along a side of the usual image, as these towers have no size of their own


def row_host(model: nn.Module, block: str, records: Any) -> Host:
    """The facts of a tower. block: the class of its layers; records: see `BlockHost`."""
    tower: Any = model
    merge = int(tower.spatial_merge_size)
    side = max(_SIDE // merge, 1) * merge
    return Host(
        model=model,
        blocks=[_block(f"blocks.{i}", layer, block, records) for i, layer in enumerate(tower.blocks)],
        num_prefix_tokens=0,
        tokens=side * side,
        grid=(side, side),
        example=partial(_example, model, side),
        restored=_restored,
        refused=_refused,
        has_class_token=False,
        row=_row,
    )


def _block(name: str, layer: nn.Module, known: str, records: Any) -> BlockHost:
    if type(layer).__qualname__ != known:
        raise unknown_module(layer)
    inner: Any = layer
    attention = inner.attn
    qkv, heads = attention.qkv, int(attention.num_heads)
    return BlockHost(
        name,
        layer,
        taps=(("queries", qkv), ("keys", qkv), ("values", qkv)),
        read=partial(_queries_and_keys, heads),
        values=partial(_values, heads),
        scale=float(attention.scaling),
        key_bias="attention_bias",
        takes_bias=takes_bias(attention.config),
        rope_argument="position_embeddings",
        rotate=_rotate,
        mid=mixed(MidRowLayer, type(layer)),
        width=int(qkv.in_features),
        check_arguments=partial(_one_segment, int(qkv.in_features) // heads),
        records=records,
        swaps=(
            (layer, mixed(RowLayer, type(layer))),
            (attention, mixed(BiasedRowAttention, type(attention))),
        ),
        attentions=(attention,),
        in_row=True,
        lengths_argument="cu_seqlens",
        longest_argument="max_seqlen",
    )


def _third(heads: int, which: int, projected: Tensor) -> Tensor:
    """Queries, keys or values [1, H, t, D] among [t, 3 * H * D]."""
    return projected.view(len(projected), 3, heads, -1)[:, which].transpose(0, 1).unsqueeze(0)


def _queries_and_keys(
    heads: int, queries: Tensor | None, keys: Tensor | None, _: Caught | None
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if queries is None else _third(heads, 0, queries),
        None if keys is None else _third(heads, 1, keys),
    )


def _values(heads: int, _: nn.Module, projected: Tensor) -> Tensor:
    return _third(heads, 2, projected)


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = table
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _one_segment(width: int, x: Tensor) -> dict[str, Any]:
    angles = x[:, :1] * torch.ones(width, device=x.device)
    starts = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
    return {"cu_seqlens": starts, "position_embeddings": (angles.cos(), angles.sin())}


def _row(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Stretch, ...]:
    """How the images of a forward lie in their row; the frames of a video are images."""
    grids = args[1] if len(args) > 1 else kwargs["grid_thw"]
    found = []
    for size, same in groupby(grids.tolist(), lambda grid: (int(grid[1]), int(grid[2]))):
        found.append(Stretch(sum(int(frames) for frames, _, _ in same), size, _order(*_laying(model), *size)))
    return tuple(found)


def _laying(model: Any) -> tuple[str, int, int | None, int]:
    """What the order of patches depends on: the tower's library, merged groups, windows and patches, in pixels."""
    original = getattr(type(model), "_tokenprune_original", type(model))
    return (
        original.__module__,
        int(model.spatial_merge_size),
        getattr(model, "window_size", None),
        model.config.patch_size,
    )


@lru_cache(maxsize=256)
def _order(library: str, merge: int, window: int | None, patch: int, rows: int, columns: int) -> Tensor:
    """[rows * columns] the patch, counted row by row, at each place of an image in its row."""
    patches = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    groups = patches.transpose(1, 2).reshape(-1, merge * merge)
    if window is not None:
        groups = groups[_windows(library, merge, window, patch, torch.tensor([[1, rows, columns]]))[0]]
    return groups.flatten()


def _windows(library: str, merge: int, window: int, patch: int, grids: Tensor) -> tuple[Tensor, Tensor]:
    """The order of merged groups, and where windows start."""
    host: Any = sys.modules[library]
    found = host.get_vision_window_index(
        grids, spatial_merge_size=merge, window_size=window, patch_size=patch, kwargs={}
    )
    return found[0], found[1]


def _example(model: Any, side: int) -> dict[str, Any]:
    """One image. What the tower would find out from the size of the grid is given, as that is not on its device where
    it is counted."""
    config, grids = model.config, torch.tensor([[1, side, side]])
    weight = next(model.patch_embed.parameters())
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    library, merge, window, patch = _laying(model)
    host: Any = sys.modules[library]
    example = {
        "hidden_states": torch.empty(side * side, values, device=weight.device, dtype=weight.dtype),
        "grid_thw": grids,
        "position_ids": host.get_vision_position_ids(grids, merge, kwargs={}).to(weight.device),
        "cu_seqlens": torch.tensor([0, side * side], dtype=torch.int32),
    }
    if window is not None:
        index, starts = _windows(library, merge, window, patch, grids)
        example |= {"window_index": index, "cu_window_seqlens": starts}
    if hasattr(model, "num_grid_per_side"):
        taps = host.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=model.num_grid_per_side,
            mode=model.interpolation_mode,
            align_corners=model.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs={},
        )
        example |= dict(zip(("interp_indices", "interp_weights"), (x.to(weight.device) for x in taps), strict=True))
    return example


def _restored(model: Any, _: bool, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The last layer, those whose features go to the language model's own layers, and those whose hidden states are
    asked for."""
    depth = len(model.blocks)
    features = getattr(model, "deepstack_visual_indexes", ())
    return tuple({depth - 1, *features} | asked_layers(model.config, depth, kwargs))


def _refused(model: Any, biased: bool, *args: Any, **kwargs: Any) -> str:
    return refused_in_towers(model.config, biased, kwargs)
