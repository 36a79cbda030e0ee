"""Layers of transformers' language models: queries and keys of a few tokens, out of the layer's own modules."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import unknown_module
from tokenprune.lvlm.host import LayerFacts


def text_layer(text: Any, index: int) -> LayerFacts:
    """The facts of a layer.

    Raises:
        UnsupportedModel: it is built in another way.
    """
    layer: Any = text.layers[index]
    attention: Any = getattr(layer, "self_attn", None)
    parts = (
        getattr(layer, "input_layernorm", None),
        getattr(attention, "q_proj", None),
        getattr(attention, "k_proj", None),
    )
    if any(part is None for part in parts) or not hasattr(attention, "head_dim"):
        raise unknown_module(layer)
    return LayerFacts(
        queries=partial(_projected, "q"),
        keys=partial(_projected, "k"),
        scale=float(attention.scaling),
        flash="flash" in str(attention.config._attn_implementation),
    )


def _projected(kind: str, layer: Any, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, T, C] -> [B, H, T, D]; modules are called, as a quantised or offloaded one has no weight to read."""
    attention = layer.self_attn
    projected: Tensor = getattr(attention, f"{kind}_proj")(layer.input_layernorm(x))
    heads = projected.reshape(*x.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{kind}_norm", None)
    heads = (heads if norm is None else norm(heads)).transpose(1, 2)
    if table is None:
        return heads
    library: Any = sys.modules[_host_class(attention).__module__]
    turned: Tensor = library.apply_rotary_pos_emb(heads, heads, *table)[0]
    return turned


def _host_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_tokenprune_original", type(module))
