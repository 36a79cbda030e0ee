"""transformers' image towers: CLIP, SigLIP, ViT, DeiT, BEiT, DINOv2 (with registers), DINOv3 and those of InternVL,
Idefics3, SmolVLM and the Qwen-VL models, alone or inside a model.

Classes are known by name, so that nothing of transformers is imported for a model that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.adapters.hf_vision_blocks import (
    MID_LAYERS,
    BiasedAttention,
    Layer,
    RaggedTowerAttention,
    ReindexedRelativeBias,
    UnmaskedLayer,
    asked_layers,
    refused_in_towers,
    takes_bias,
)
from tokenprune.adapters.hf_vision_rows import ROW_TOWERS, row_host
from tokenprune.adapters.ragged import RaggedDropPath
from tokenprune.adapters.swapping import mixed
from tokenprune.errors import UnsupportedModel, unknown_module
from tokenprune.host import BlockHost, Caught, Host, tokens_first
from tokenprune.registry import register_adapter

# Tower: where its layers are, and its prefix tokens without registers.
TOWERS = {
    "clip.CLIPVisionModel": ("encoder.layers", 1),
    "siglip.SiglipVisionModel": ("encoder.layers", 0),
    "vit.ViTModel": ("layers", 1),
    "deit.DeiTModel": ("layers", 2),
    "beit.BeitModel": ("layers", 1),
    "dinov2.Dinov2Model": ("encoder.layer", 1),
    "dinov2.Dinov2Backbone": ("encoder.layer", 1),
    "dinov2_with_registers.Dinov2WithRegistersModel": ("encoder.layer", 1),
    "dinov2_with_registers.Dinov2WithRegistersBackbone": ("encoder.layer", 1),
    "dinov3_vit.DINOv3ViTModel": ("model.layer", 1),
    "dinov3_vit.DINOv3ViTBackbone": ("model.layer", 1),
    "internvl.InternVLVisionModel": ("encoder.layer", 1),
    "idefics3.Idefics3VisionTransformer": ("encoder.layers", 0),
    "smolvlm.SmolVLMVisionTransformer": ("encoder.layers", 0),
}
_LOOK_FOR_PADDING = dict.fromkeys(("idefics3.Idefics3VisionTransformer", "smolvlm.SmolVLMVisionTransformer"), True)
_BEIT_MASK = 3  # where BeitModel takes the caller's attention mask
Fact = TypeVar("Fact")


def entry_of(cls: type, table: Mapping[str, Fact]) -> Fact | None:
    """The entry of a class of transformers' own, under "model.Class"."""
    library, _, model = cls.__module__.rpartition(".")[0].rpartition(".models.")
    return table.get(f"{model}.{cls.__qualname__}") if library == "transformers" else None


def _known(module: nn.Module, table: Mapping[str, Fact]) -> Fact | None:
    known = (entry_of(cls, table) for cls in type(module).__mro__)
    return next((facts for facts in known if facts is not None), None)


def _facts(module: nn.Module) -> tuple[str, int] | None:
    return _known(module, TOWERS)


@register_adapter
class TransformersVisionTower:
    """See `tokenprune.host.Adapter`."""

    name = "hf_vision"

    def find(self, target: object) -> nn.Module | None:
        assert isinstance(target, nn.Module)
        towers = {**TOWERS, **ROW_TOWERS}
        found = {name: module for name, module in target.named_modules() if _known(module, towers) is not None}
        if not found:
            _refuse_naflex(target)
            return None
        if len(found) > 1:
            raise UnsupportedModel(
                f"{type(target).__name__} holds {len(found)} image towers; patch each by itself:"
                f" {', '.join(f'model.{name}' for name in found)}"
            )
        name, tower = next(iter(found.items()))
        if any(_generates(module) for module in target.modules()):
            raise UnsupportedModel(
                f"{type(target).__name__} generates text, and a budget would be that of its whole prompt; patch its"
                f" image tower: tokenprune.patch(model.{name}, ...)"
            )
        return tower

    def host(self, model: nn.Module) -> Host:
        parts: Any = model
        block = _known(model, ROW_TOWERS)
        if block is not None:
            return row_host(model, block, _records)
        facts = _facts(model)
        assert facts is not None
        path, prefix = facts
        prefix += int(getattr(parts.config, "num_register_tokens", 0))
        size = _image_size(parts.config)
        rows, columns = _grid_at(model, size)
        return Host(
            model=model,
            blocks=[
                _block(f"{path}.{i}", layer, prefix, size, rows * columns) for i, layer in enumerate(_layers(model))
            ],
            num_prefix_tokens=prefix,
            tokens=rows * columns,
            grid=(rows, columns),
            example=partial(_example, model, size),
            grid_of=_grid_of,
            restored=_restored,
            refused=_refused,
            has_class_token=prefix > 0,
            ragged_head=True,
        )


def _refuse_naflex(target: nn.Module) -> None:
    naflex = {"siglip2.Siglip2VisionModel": True}
    if any(_known(module, naflex) for module in target.modules()):
        raise UnsupportedModel(
            "a Siglip2VisionModel pads images of different sizes under a mask, and tokens cannot be reduced under one;"
            " SigLIP 2 checkpoints of a fixed size load as SiglipModel, which works"
        )


def _generates(module: nn.Module) -> bool:
    can_generate = getattr(module, "can_generate", None)
    return hasattr(module, "language_model") or (callable(can_generate) and bool(can_generate()))


def _layers(model: Any) -> nn.ModuleList:
    facts = _facts(model)
    assert facts is not None
    layers: Any = model.get_submodule(facts[0])
    return layers


def _image_size(config: Any) -> tuple[int, int]:
    size = config.image_size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _patching(model: Any) -> nn.Conv2d:
    return next(module for module in model.embeddings.modules() if isinstance(module, nn.Conv2d))


def _grid_at(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    conv = _patching(model)
    rows, columns = ((s - k) // step + 1 for s, k, step in zip(size, conv.kernel_size, conv.stride, strict=True))
    return rows, columns


def _grid_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
    image = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(image, Tensor) or image.ndim != 4:
        return None
    return _grid_at(model, (image.shape[-2], image.shape[-1]))


class _NoPadding(Tensor):
    """A mask of patches, all of them there, that says so on the meta device, where a model cannot look."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all:
            return True
        out = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        still_mask = func in (Tensor.view, Tensor.to) or not isinstance(out, Tensor)
        return out if still_mask else out.as_subclass(Tensor)


def _example(model: nn.Module, size: tuple[int, int]) -> Tensor | dict[str, Tensor]:
    conv = _patching(model)
    image = torch.empty(1, conv.in_channels, *size, device=conv.weight.device, dtype=conv.weight.dtype)
    if not _known(model, _LOOK_FOR_PADDING):
        return image
    there = torch.ones(1, *_grid_at(model, size), dtype=torch.bool, device=conv.weight.device)
    return {"pixel_values": image, "patch_attention_mask": there.as_subclass(_NoPadding)}


def _restored(model: Any, _: bool, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The last layer, whose output every tower returns, and those whose hidden states are asked for."""
    read = asked_layers(model.config, int(model.config.num_hidden_layers), kwargs)
    if hasattr(model, "stage_names"):  # a backbone
        stages = (model.stage_names.index(stage) for stage in model.out_features)
        read |= {stage - 1 for stage in stages if stage > 0}
    return tuple({len(_layers(model)) - 1} | read)


def _refused(model: Any, biased: bool, *args: Any, **kwargs: Any) -> str:
    reason = refused_in_towers(_attention(_layers(model)[0]).config, biased, kwargs)
    if reason:
        return reason
    if kwargs.get("attention_mask", args[_BEIT_MASK] if len(args) > _BEIT_MASK else None) is not None:
        return "tokens cannot be reduced under an attention mask; call the model without one, or unpatch it first"
    return ""


def _attention(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def _block(name: str, layer: nn.Module, prefix: int, size: tuple[int, int], tokens: int) -> BlockHost:
    mid = entry_of(type(layer), MID_LAYERS)
    if mid is None:
        raise unknown_module(layer)
    inner: Any = layer
    attention = _attention(layer)
    by_head = partial(_by_head, attention.head_dim)
    facts = BlockHost(
        name,
        layer,
        arguments=("attention_mask",),
        taps=(
            ("queries", getattr(attention, "q_norm", attention.q_proj)),
            ("keys", getattr(attention, "k_norm", attention.k_proj)),
            ("values", attention.v_proj),
        ),
        read=partial(_queries_and_keys, attention.head_dim),
        values=by_head,
        scale=float(attention.scaling if hasattr(attention, "scaling") else attention.scale),
        key_bias="attention_mask",
        takes_bias=takes_bias(attention.config),
        mask_argument="attention_mask",
        mid=mixed(mid, type(layer)),
        width=int(attention.config.hidden_size),
        check_arguments=_unmasked,
        records=_records,
        swaps=((layer, mixed(Layer, type(layer))),),
        attentions=(attention,),
    )
    if hasattr(inner, "relative_position_bias"):  # BEiT's layer gets the model's shared bias as a mask
        facts.mask_argument, facts.bias_arguments = None, ("attention_mask",)
        facts.check_arguments, facts.check_tokens = partial(_at_resolution, size), tokens
        if inner.relative_position_bias is not None:
            bias = inner.relative_position_bias
            facts.swaps += ((bias, mixed(ReindexedRelativeBias, type(bias))),)
    if mid.__name__ == "MidInternVLLayer":
        facts.check_arguments = None
        facts.swaps = (
            (layer, mixed(UnmaskedLayer, type(layer))),
            (attention, mixed(BiasedAttention, type(attention))),
        )
    if mid.__name__ == "MidDinoLayer" and "dinov3" in type(layer).__module__:
        facts.rope_argument = "position_embeddings"
        facts.rotate = partial(_rotate, prefix)
        facts.check_arguments = partial(_some_rotation, prefix, attention.head_dim)
    facts.ragged_swaps = (
        *facts.swaps,
        (attention, mixed(RaggedTowerAttention, type(attention))),
        *((m, mixed(RaggedDropPath, type(m))) for m in layer.modules() if type(m).__name__.endswith("DropPath")),
    )
    return facts


def _by_head(width: int, _: nn.Module, projected: Tensor) -> Tensor:
    """[B, N, H * D] as [B, H, N, D]."""
    return projected.reshape(*projected.shape[:-1], -1, width).transpose(1, 2)


def _queries_and_keys(
    width: int, queries: Tensor | None, keys: Tensor | None, _: Caught | None
) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys [B, N, H * D] as their projections put them out, under any attention implementation."""
    return tokens_first(
        queries.reshape(*queries.shape[:-1], -1, width) if queries is not None else None,
        keys.reshape(*keys.shape[:-1], -1, width) if keys is not None else None,
        None,
    )


def _rotate(prefix: int, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = table
    body = x[:, :, prefix:]
    first, second = body.chunk(2, -1)
    return torch.cat([x[:, :, :prefix], body * cos + torch.cat([-second, first], -1) * sin], 2)


def _unmasked(x: Tensor) -> dict[str, Any]:
    return {"attention_mask": None}


def _at_resolution(size: tuple[int, int], x: Tensor) -> dict[str, Any]:
    return {"attention_mask": None, "resolution": size}


def _some_rotation(prefix: int, width: int, x: Tensor) -> dict[str, Any]:
    angles = x[0, prefix:, :width]
    return {"position_embeddings": (angles.cos(), angles.sin())}


def _records(hook: Any) -> bool:
    """Whether a hook is one of those with which transformers collects hidden states."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
