"""Layers and attentions of transformers' image towers that take all images in one row (see `hf_vision_blocks`)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters.swapping import Mixin
from tokenprune.here import reduce_here, run_here


class RowLayer(Mixin):
    """A layer of Qwen-VL's towers as it is."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return run_here(self, super().forward, hidden_states, **kwargs)


class MidRowLayer(Mixin):
    """A layer of Qwen-VL's towers run by its parts."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return run_here(self, self.by_parts, hidden_states, **kwargs)

    def by_parts(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Attention, reduction, MLP."""
        layer: Any = self
        x = x + layer.attn(layer.norm1(x), **kwargs)
        x = reduce_here(x)
        return x + layer.mlp(layer.norm2(x))


class BiasedRowAttention(Mixin):
    """An attention of Qwen-VL's towers, run by its parts where keys have a bias, which it has no argument for."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Any = None,
        attention_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_bias is None:
            tokens: Tensor = super().forward(
                hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs
            )
            return tokens
        own: Any = self
        host: Any = sys.modules[self._tokenprune_original.__module__]
        q, k, v = own.qkv(hidden_states).view(len(hidden_states), 3, own.num_heads, -1).unbind(1)
        q, k = host.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        attend = host.ALL_ATTENTION_FUNCTIONS.get_interface(
            own.config._attn_implementation, host.eager_attention_forward
        )
        lengths = cu_seqlens.diff().tolist()
        heads = (torch.split(x.transpose(0, 1).unsqueeze(0), lengths, 2) for x in (q, k, v))
        dropout = own.attention_dropout if self.training else 0.0
        segments = [
            attend(self, *qkv, attention_mask=bias, scaling=own.scaling, dropout=dropout, is_causal=False)[0]
            for *qkv, bias in zip(*heads, torch.split(attention_bias, lengths, -1), strict=True)
        ]
        attended: Tensor = own.proj(torch.cat(segments, 1).reshape(len(hidden_states), -1))
        return attended
