"""Image towers as parts of transformers' vision-language models: where attention is read, and how patches become
placeholders. Attention is read off hooked projections, whatever computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapters.hf_vision import TOWERS
from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.host import Scored, TowerCall, pooled, square


@dataclass(frozen=True)
class TowerFacts:
    """prefix: (tower) -> its prefix tokens. at: (model, tower, layer asked for) -> what is read there, None where it is
    not known."""

    prefix: Callable[[Any], int]
    at: Callable[[Any, Any, int | None], Scored | None]


def _prefix_of(prefix: int, tower: Any) -> int:
    return prefix + int(getattr(tower.config, "num_register_tokens", 0))


def _by_projections(layers: str, attention: str, prefix: int, model: Any, tower: Any, layer: int | None) -> Scored:
    """Queries and keys behind projections of their own (and norms, where there are any)."""
    stack = tower.get_submodule(layers)
    index = _index(model, len(stack), layer)
    module = stack[index].get_submodule(attention)
    parts = [("queries", "q_norm", "q_proj"), ("keys", "k_norm", "k_proj")]
    taps = tuple((kind, getattr(module, norm, None) or getattr(module, proj)) for kind, norm, proj in parts)
    scale = float(module.scaling if hasattr(module, "scaling") else module.scale)
    prefix = _prefix_of(prefix, tower)
    return Scored(stack[index], index, taps, partial(_tile_records, index, prefix, int(module.head_dim), scale))


def _index(model: Any, depth: int, layer: int | None) -> int:
    """The layer whose output is the feature, or a layer counted from the end or from 0."""
    if layer is not None:
        return range(depth)[layer]
    feature = getattr(model.config, "vision_feature_layer", -1)
    feature = feature[-1] if isinstance(feature, (list, tuple)) else feature
    return range(depth)[feature if feature < 0 else max(feature - 1, 0)]  # hidden state 0 is the embeddings


def _tile_records(index: int, prefix: int, width: int, scale: float, call: TowerCall) -> list[AttentionRecord]:
    """One record of all tiles [T, N, ..]; behind the tower the layer that is scored is the last."""
    q, k = (
        x.detach().reshape(*x.shape[:-1], -1, width).transpose(1, 2)
        for x in (call.caught["queries"], call.caught["keys"])
    )
    tiles, tokens = q.shape[0], q.shape[2]
    mask = call.bound.get("patch_attention_mask")
    if isinstance(mask, Tensor):
        mask = mask.reshape(tiles, 1, 1, -1) if not bool(mask.all()) else None
    return [
        AttentionRecord(
            hidden=_behind(index, call).detach(),
            origin=torch.arange(tokens - prefix, device=q.device).expand(tiles, -1),
            num_prefix_tokens=prefix,
            place=index,
            depth=index + 1,
            grid=square(tokens - prefix),
            has_class_token=prefix > 0,
            scale=scale,
            queries=q,
            keys=k,
            bias=mask,
        )
    ]


def _behind(index: int, call: TowerCall) -> Tensor:
    """The state behind a layer where it is known, else behind the last."""
    if call.output is None:
        return call.caught["hidden"]
    states = call.output.get("hidden_states")
    state = states[index + 1] if states is not None else None
    return call.output.last_hidden_state if state is None else state


def _by_packed_row(model: Any, tower: Any, layer: int | None) -> Scored:
    """Queries and keys of images that lie in one row, each attending to itself (a frame of a video to itself)."""
    depth = len(tower.blocks)
    full = getattr(tower, "fullatt_block_indexes", None) or range(depth)
    index = max(full) if layer is None else range(depth)[layer]
    attention = tower.blocks[index].attn
    taps = (("qkv", attention.qkv), ("block_inputs", attention))
    scale = float(attention.scaling)
    return Scored(tower.blocks[index], index, taps, partial(_row_records, index, int(attention.num_heads), scale))


def _row_records(index: int, heads: int, scale: float, call: TowerCall) -> list[AttentionRecord]:
    """One record for each image (or frame), in the order of the row."""
    inputs = call.caught["block_inputs"]
    qkv = call.caught["qkv"].detach()
    q, k, _ = qkv.reshape(len(qkv), 3, heads, -1).permute(1, 2, 0, 3).unbind(0)
    cos, sin = inputs["position_embeddings"]
    lengths = inputs["cu_seqlens"].diff().tolist()
    state = call.caught["hidden"] if call.output is None else call.output.last_hidden_state
    state = state[: len(qkv)]  # where fewer tokens are left of a tower that is patched itself, the caller refuses it
    parts = zip(*(x.split(lengths, dim=-2) for x in (q, k, cos, sin)), state.split(lengths), strict=True)
    return [
        AttentionRecord(
            hidden=hidden.detach().unsqueeze(0),
            origin=torch.arange(len(hidden), device=q.device).unsqueeze(0),
            num_prefix_tokens=0,
            place=index,
            depth=index + 1,
            grid=None,
            has_class_token=False,
            scale=scale,
            queries=queries.unsqueeze(0),
            keys=keys.unsqueeze(0),
            rotate=partial(_rotate, cosines, sines),
        )
        for queries, keys, cosines, sines, hidden in parts
    ]


def _rotate(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    return x.float() * cos.float() + torch.cat([-second, first], -1) * sin.float()


def _unknown(model: Any, tower: Any, layer: int | None) -> None:
    """Rotary tables and a bias of their own."""


_SIGLIP_LIKE = TowerFacts(lambda tower: 0, partial(_by_projections, "encoder.layers", "self_attn", 0))
_ROW = TowerFacts(lambda tower: 0, _by_packed_row)
SCORED = {
    name: TowerFacts(
        partial(_prefix_of, prefix),
        partial(_by_projections, layers, "self_attn" if layers == "encoder.layers" else "attention", prefix)
        if "dinov3" not in name and "beit" not in name
        else _unknown,
    )
    for name, (layers, prefix) in TOWERS.items()
} | {
    "internvl.InternVLVisionModel": TowerFacts(
        lambda tower: 1, partial(_by_projections, "encoder.layer", "attention", 1)
    ),
    "idefics3.Idefics3VisionTransformer": _SIGLIP_LIKE,
    "smolvlm.SmolVLMVisionTransformer": _SIGLIP_LIKE,
    "qwen2_vl.Qwen2VisionTransformerPretrainedModel": _ROW,
    "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel": _ROW,
    "qwen3_vl.Qwen3VLVisionModel": _ROW,
}


def tiles_behind_prefix(prefix: int, call: TowerCall) -> tuple[int, int]:
    """(tiles, patches of each) of a tower that returns [T, prefix + n, C]."""
    tiles, tokens = call.output.last_hidden_state.shape[:2]
    return tiles, tokens - prefix


def tiles_in_a_row(call: TowerCall) -> tuple[int, int]:
    """(1, patches) of a tower that returns [patches, C]."""
    return 1, call.output.last_hidden_state.shape[0]


def grid_of_tile(placeholders: int, place: int, call: TowerCall) -> tuple[int, int] | None:
    """(rows, columns) of a square tile."""
    return square(placeholders)


def grid_of_packed(model: Any, placeholders: int, place: int, call: TowerCall) -> tuple[int, int] | None:
    """(rows, columns) of an image of one frame, from the row of grids that the tower was given."""
    frames, rows, columns = call.bound["grid_thw"][place].tolist()
    merge = model.visual.spatial_merge_size
    return (rows // merge, columns // merge) if frames == 1 else None


def lift_tiles(groups: Callable[[Tensor], Tensor] | None, others: int, values: Tensor, call: TowerCall) -> list[Tensor]:
    """Values [T, n, C] of patches for the placeholders of each tile, the first `others` of which are no patches."""
    lifted = values if groups is None else pooled(values, groups)
    return list(torch.nn.functional.pad(lifted, (0, 0, others, 0)))


def lift_merged(model: Any, values: Tensor, call: TowerCall) -> list[Tensor]:
    """Values [1, patches, C] of a row of images whose patches were merged, side by side, by the tower itself."""
    tower, grid = model.visual, call.bound["grid_thw"]
    unit = tower.spatial_merge_size**2
    means = values.view(-1, unit, values.shape[-1]).mean(1)
    if hasattr(tower, "window_size"):  # the row was ordered by windows
        library: Any = sys.modules[_host_class(tower).__module__]
        windows, _ = library.get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
            kwargs={},
        )
        means = means[windows.to(means.device).argsort()]
    return list(torch.split(means, (grid.prod(-1) // unit).tolist()))


def _host_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_tokenprune_original", type(module))


def internvl_groups(model: Any, patches: Tensor) -> Tensor:
    """InternVL's pixel shuffle: [T, n, 1] -> [T, n', patches of each]."""
    tiles, tokens, _ = patches.shape
    side = int(tokens**0.5)
    shuffled = model.pixel_shuffle(patches.view(tiles, side, side, 1), scale_factor=model.config.downsample_ratio)
    return shuffled.reshape(tiles, -1, shuffled.shape[-1])


def connector_groups(model: Any, patches: Tensor) -> Tensor:
    """Idefics3's pixel shuffle."""
    return model.connector.pixel_shuffle(patches, model.connector.scale_factor)


def gemma_groups(model: Any, patches: Tensor) -> Tensor:
    """Gemma 3's average pooling, which has taken the mean already."""
    projector = model.multi_modal_projector
    side = projector.patches_per_image
    grids = patches.transpose(1, 2).reshape(len(patches), 1, side, side)
    return projector.avg_pool(grids).flatten(1).unsqueeze(-1)
