"""transformers' vision-language models: LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL,
Gemma 3, PaliGemma, Idefics3 and SmolVLM.

Classes are known by name, so that nothing of transformers is imported for a model that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenprune.adapters.hf_lvlm_crops import BOTH_WAYS, WHOLE, idefics_crops, internvl_crops, llava_crops
from tokenprune.adapters.hf_lvlm_layers import text_layer
from tokenprune.adapters.hf_lvlm_towers import (
    SCORED,
    connector_groups,
    gemma_groups,
    grid_of_packed,
    grid_of_tile,
    internvl_groups,
    lift_merged,
    lift_tiles,
    tiles_behind_prefix,
    tiles_in_a_row,
)
from tokenprune.adapters.hf_vision import entry_of
from tokenprune.adapters.swapping import Mixin, mixed
from tokenprune.errors import UnsupportedModel
from tokenprune.family import Request
from tokenprune.lvlm.encoded import pack_here
from tokenprune.lvlm.host import Crops, LvlmHost
from tokenprune.lvlm.patch import LvlmPatch
from tokenprune.lvlm.prepare import attach, prepare
from tokenprune.method import Method
from tokenprune.registry import register_adapter


@dataclass(frozen=True)
class Family:
    """One model class. groups: (model, patches [T, n, 1]) -> [T, n', patches of each placeholder]; None where a patch
    is a placeholder. merged: whether the tower itself merges patches, whose images lie in a row. packed: whether tiles
    of an image are packed by the model. masks_first: see `LvlmHost`. video: whether a video's placeholders are its
    patches, merged as an image's. plain: whether features [images, n, C] are projected as they are. crops: (model) ->
    how crops are encoded by themselves, or why they cannot be."""

    tower: str = "vision_tower"
    text: str = "language_model"
    projector: str = "multi_modal_projector"
    groups: Callable[[Any, Any], Any] | None = None
    merged: bool = False
    packed: bool = False
    masks_first: bool = False
    video: bool = False
    plain: bool = False
    crops: Callable[[Any], Crops] | str = llava_crops


_QWEN = Family(tower="visual", projector="", merged=True, video=True, crops=WHOLE)
_IDEFICS = Family(
    tower="vision_model", text="text_model", projector="connector", groups=connector_groups, crops=idefics_crops
)
FAMILIES = {
    "llava.LlavaModel": Family(plain=True),
    "llava_next.LlavaNextModel": Family(packed=True),
    "llava_onevision.LlavaOnevisionModel": Family(packed=True),
    "qwen2_vl.Qwen2VLModel": _QWEN,
    "qwen2_5_vl.Qwen2_5_VLModel": _QWEN,
    "qwen3_vl.Qwen3VLModel": _QWEN,
    "internvl.InternVLModel": Family(groups=internvl_groups, crops=internvl_crops),
    "gemma3.Gemma3Model": Family(groups=gemma_groups, masks_first=True, crops=BOTH_WAYS),
    "paligemma.PaliGemmaModel": Family(masks_first=True, plain=True, crops=BOTH_WAYS),
    "idefics3.Idefics3Model": _IDEFICS,
    "smolvlm.SmolVLMModel": _IDEFICS,
}


class PackingModel(Mixin):
    """A model that packs the tiles of an image, with separators at the end of rows."""

    _tokenprune_adapter = "hf_lvlm"

    def pack_image_features(self, image_features: Any, *args: Any, **kwargs: Any) -> Any:
        return pack_here(self, super().pack_image_features, image_features, args, kwargs)  # type: ignore[misc]


@register_adapter
class TransformersLvlm:
    """See `tokenprune.family.Family`."""

    name = "hf_lvlm"
    composes = True

    def find(self, target: object) -> nn.Module | None:
        assert isinstance(target, nn.Module)
        found = [(name, module) for name, module in target.named_modules() if _family(module) is not None]
        if not found:
            return None
        if len(found) > 1:
            raise UnsupportedModel(
                f"{type(target).__name__} holds {len(found)} vision-language models; patch each by itself:"
                f" {', '.join(f'model.{name}' for name, _ in found)}"
            )
        name, model = found[0]
        path = [module for outer, module in target.named_modules() if _holds(outer, name)]
        wholes = [module for module in path if getattr(module, "model", None) is model]
        return wholes[0] if wholes else model

    def describe(self, model: nn.Module) -> LvlmHost:
        """The facts of a vision-language model."""
        return describe(model)

    def prepare(self, model: nn.Module, method: Method, request: Request) -> LvlmPatch:
        """The patch of a vision-language model."""
        return prepare(describe, model, self.name, method, request)

    def attach(self, model: nn.Module, patch: LvlmPatch) -> None:
        """Put a patch on the model."""
        attach(describe(model), patch)


def describe(outer: nn.Module) -> LvlmHost:
    """The facts of a vision-language model."""
    model: Any = outer if _family(outer) is not None else outer.model
    family = _family(model)
    assert family is not None
    tower, text = getattr(model, family.tower), getattr(model, family.text)
    if type(tower).__name__ == "PixtralVisionModel":
        raise UnsupportedModel(
            "PixtralVisionModel gives the patches of all images of a call in one row, and which are of which image is"
            " not known here; use Llava with another tower"
        )
    config = model.config
    tokens = {"image": int(config.image_token_id)}
    inputs = ["pixel_values", "mm_encoder_outputs"]
    if getattr(config, "video_token_id", None) is not None:
        inputs.insert(1, "pixel_values_videos")
        if family.video:
            tokens["video"] = int(config.video_token_id)
    scored = _scored(tower)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    prefix = scored.prefix(tower) if scored is not None else int(strategy == "default")
    others = _others(family, strategy, tower, prefix)
    lift = None
    if family.merged:
        lift = partial(lift_merged, model)
    elif not family.packed:
        lift = partial(lift_tiles, partial(family.groups, model) if family.groups is not None else None, others)
    return LvlmHost(
        outer=outer,
        model=model,
        text=text,
        tower=tower,
        tokens=tokens,
        inputs=tuple(inputs),
        masks_first=family.masks_first,
        scored=partial(scored.at, model, tower) if scored is not None else lambda layer: None,
        lift=lift,
        tiles=tiles_in_a_row if family.merged else partial(tiles_behind_prefix, prefix),
        grid=partial(grid_of_packed, model) if family.merged else grid_of_tile,
        packs=mixed(PackingModel, _original(model)) if family.packed else None,
        window=_window(text),
        layers=tuple(text.layers),
        layer=partial(text_layer, text) if _leaves_between(text) else None,
        projector=getattr(model, family.projector) if family.projector else None,
        plain=family.plain,
        head=getattr(outer, "lm_head", None) if outer is not model else None,
        example=partial(_example, text),
        offers=_offers(tower, prefix),
        refused=partial(_refused, family),
        crops=family.crops if isinstance(family.crops, str) else partial(family.crops, model),
    )


def _others(family: Family, strategy: str | None, tower: nn.Module, prefix: int) -> int:
    """Visual tokens of an image in front of its patches: class and register tokens that are not left out."""
    others = prefix - int(strategy == "default") if strategy is not None else 0
    if others < 0:
        raise UnsupportedModel(
            "vision_feature_select_strategy='default' leaves out the first token of each image, which is a patch of a"
            f" {type(tower).__name__}; use 'full'"
        )
    if others and not family.plain:
        raise UnsupportedModel(
            f"{others} of an image's visual tokens are no patches, but class or register tokens of the"
            f" {type(tower).__name__}, and this model arranges them like patches; with a class token alone use"
            " vision_feature_select_strategy='default'"
        )
    return others


def _family(module: nn.Module) -> Family | None:
    found = (entry_of(cls, FAMILIES) for cls in type(module).__mro__)
    return next((family for family in found if family is not None), None)


def _scored(tower: nn.Module) -> Any:
    found = (entry_of(cls, SCORED) for cls in type(tower).__mro__)
    return next((facts for facts in found if facts is not None), None)


def _offers(tower: nn.Module, prefix: int) -> frozenset[str]:
    twins = {"clip.CLIPVisionModel": "text tower", "siglip.SiglipVisionModel": "text tower"}
    found = {entry_of(cls, twins) for cls in type(tower).__mro__} - {None}
    return frozenset(found | ({"class token"} if prefix else set()))  # type: ignore[arg-type]


def _original(model: nn.Module) -> type[nn.Module]:
    return getattr(type(model), "_tokenprune_original", type(model))


def _holds(outer: str, inner: str) -> bool:
    return outer == "" or inner.startswith(f"{outer}.")


def _example(text: Any, tokens: int) -> dict[str, Any]:
    weight = next(text.parameters())
    mask: Any = torch.zeros(1, 1, tokens, tokens, device="meta", dtype=weight.dtype)
    kinds = getattr(text.config, "layer_types", None) or ()
    if any("sliding" in kind for kind in kinds):
        mask = dict.fromkeys(kinds, mask)
    return {
        "inputs_embeds": torch.zeros(1, tokens, text.config.hidden_size, device="meta", dtype=weight.dtype),
        "attention_mask": mask,
        "position_ids": torch.zeros(1, tokens, device="meta", dtype=torch.long),
        "use_cache": False,
    }


def _leaves_between(text: Any) -> bool:
    """Whether all layers attend to everything, so that the first one's cache is what masks are made for."""
    return set(_kinds(text)) == {"full_attention"}


def _window(text: Any) -> int | None:
    """Tokens of the sliding window, where any layer has one."""
    window = getattr(text.config, "sliding_window", None)
    return int(window) if window and any("sliding" in kind for kind in _kinds(text)) else None


def _kinds(text: Any) -> tuple[str, ...]:
    """What layers attend to; where the configuration names none, they are all alike."""
    named = getattr(text.config, "layer_types", None)
    return tuple(named or ["sliding_attention" if getattr(text.config, "sliding_window", None) else "full_attention"])


def _refused(family: Family, bound: Mapping[str, Any]) -> str:
    outputs = bound.get("mm_encoder_outputs")
    encoded = outputs.get("video") if isinstance(outputs, Mapping) else None
    if not family.video and (bound.get("pixel_values_videos") is not None or encoded is not None):
        return "a video's frames are pooled by this model, which is not followed; unpatch it for videos"
    if family.masks_first and getattr(bound.get("past_key_values"), "is_compileable", False):
        return (
            "with a static cache this model's masks are made for the whole prompt before it is pruned; use the dynamic"
            " one, or unpatch the model"
        )
    return ""
