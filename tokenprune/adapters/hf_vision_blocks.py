"""Layers of transformers' image towers with a reduction point between attention and MLP.

Each runs its host's own submodules in the host's order; whether that still gives the host's output is checked when a
model is patched. They are mixed in front of the host's class, so that none of transformers' model files is imported
for a model that is not there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tokenprune.adapters.swapping import Mixin
from tokenprune.here import bias_here, own_bias_here, reduce_here, run_here
from tokenprune.ragged_attention import attend_here, attended


class Layer(Mixin):
    """A layer as it is. transformers puts gradient checkpointing inside of a layer's `__call__`, where a layer is run
    once more without its hooks."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return run_here(self, super().forward, hidden_states, attention_mask=attention_mask, **kwargs)


class MidLayer(Mixin):
    """A layer run by its parts."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return run_here(self, self.by_parts, hidden_states, attention_mask=attention_mask, **kwargs)

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Attention, reduction, MLP."""
        raise NotImplementedError


class MidClipLayer(MidLayer):
    """The layer of CLIP, SigLIP, Idefics3 and SmolVLM."""

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = self
        x = x + layer.self_attn(hidden_states=layer.layer_norm1(x), **kwargs)[0]
        x = reduce_here(x)
        return x + layer.mlp(layer.layer_norm2(x))


class MidViTLayer(MidLayer):
    """ViT's and DeiT's layer."""

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = self
        x = layer.dropout(layer.attention(layer.layernorm_before(x), **kwargs)[0]) + x
        x = reduce_here(x)
        return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x


class MidDinoLayer(MidLayer):
    """DINOv2's layer, with and without registers, and DINOv3's."""

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = self
        x = layer.drop_path(layer.layer_scale1(layer.attention(layer.norm1(x), **kwargs)[0])) + x
        x = reduce_here(x)
        return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))) + x


class MidBeitLayer(MidLayer):
    """BEiT's layer."""

    def by_parts(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = self
        if layer.relative_position_bias is not None:
            assert resolution is not None
            window = resolution[0] // layer.patch_size, resolution[1] // layer.patch_size
            bias = layer.relative_position_bias(window, interpolate_pos_encoding, dim_size=x.shape[1])
            attention_mask = bias if attention_mask is None else bias + attention_mask
        attended = layer.attention(layer.layernorm_before(x), attention_mask=attention_mask, **kwargs)[0]
        x = layer.drop_path(layer.lambda_1 * layer.dropout(attended)) + x
        x = reduce_here(x)
        return layer.drop_path(layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x)))) + x


class MidInternVLLayer(MidLayer):
    """InternVL's layer."""

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        layer: Any = self
        x = layer.lambda_1 * layer.attention(layer.layernorm_before(x))[0] + x
        x = reduce_here(x)
        return layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(x))) + x


class UnmaskedLayer(Mixin):
    """A layer that hands its attention no mask, as it is: a `BiasedAttention` finds the bias by itself."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return run_here(self, self._alone, hidden_states, attention_mask=attention_mask)

    def _alone(self, x: Tensor, **kwargs: Any) -> Tensor:
        tokens: Tensor = super().forward(x)
        return tokens


class BiasedAttention(Mixin):
    """The attention of an `UnmaskedLayer`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states, attention_mask=bias_here(), **kwargs)


class ReindexedRelativeBias(Mixin):
    """BEiT's relative position bias of one layer, taken at the tokens that are left. It is made for the image's grid,
    and so is the number of tokens that it is interpolated to."""

    def forward(self, window_size: tuple[int, int], *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**dict(zip(("interpolate_pos_encoding", "dim_size"), args, strict=False)), **kwargs}
        kwargs["dim_size"] = 1 + window_size[0] * window_size[1]
        return own_bias_here(super().forward(window_size, **kwargs))


class RaggedTowerAttention(Mixin):
    """An attention whose tokens see those of their own image."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        forward = partial(_tokens, super().forward)
        return attend_here(forward, hidden_states, attention_mask=attention_mask, **kwargs), None


def _tokens(attention: Any, *args: Any, **kwargs: Any) -> Tensor:
    return attended(attention(*args, **kwargs))


_TAKE_BIAS = ("eager", "sdpa")


def takes_bias(config: Any) -> bool:
    """Whether the attention implementation of a model takes a bias of the keys."""
    return config._attn_implementation in _TAKE_BIAS


def asked_layers(config: Any, depth: int, kwargs: dict[str, Any]) -> set[int]:
    """The layers whose output is asked for as hidden states, in a call of a tower with these arguments."""
    asked = kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False))
    states: list[int] = []
    if asked is True:
        states = list(range(depth + 1))
    elif isinstance(asked, int | list | tuple):
        states = [state % (depth + 1) for state in ([asked] if isinstance(asked, int) else asked)]
    return {state - 1 for state in states if state > 0}


def refused_in_towers(config: Any, biased: bool, kwargs: dict[str, Any]) -> str:
    """Why tokens cannot be reduced in any tower in a call with these arguments; biased: whether a bias is added."""
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        return (
            "attention maps of reduced tokens are not those of the image; call the model without output_attentions, or"
            " unpatch it first"
        )
    if biased and not takes_bias(config):
        return (
            f"log(size) is added to the attention logits, and the attention implementation has been changed to"
            f" {config._attn_implementation!r}, which takes no bias; patch the model again with"
            " proportional=False, or use 'sdpa'"
        )
    return ""


MID_LAYERS: dict[str, type[MidLayer]] = {
    "clip.CLIPEncoderLayer": MidClipLayer,
    "siglip.SiglipEncoderLayer": MidClipLayer,
    "vit.ViTLayer": MidViTLayer,
    "deit.DeiTLayer": MidViTLayer,
    "dinov2.Dinov2Layer": MidDinoLayer,
    "dinov2_with_registers.Dinov2WithRegistersLayer": MidDinoLayer,
    "dinov3_vit.DINOv3ViTLayer": MidDinoLayer,
    "beit.BeitLayer": MidBeitLayer,
    "internvl.InternVLVisionLayer": MidInternVLLayer,
    "idefics3.Idefics3EncoderLayer": MidClipLayer,
    "smolvlm.SmolVLMEncoderLayer": MidClipLayer,
}
"""Layers that are known, by model and class."""
