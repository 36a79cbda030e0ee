"""timm's models where only prefix tokens are read behind the last block: which they are, and attentions that take the
queries of those tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, cait, eva, vision_transformer_relpos
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokenprune.adapters.swapping import Mixin, mixed, named_as
from tokenprune.adapters.timm_blocks import ReindexedBeitAttention
from tokenprune.here import front_here

_ATTENTIONS = (Attention, AttentionRope, eva.EvaAttention, vision_transformer_relpos.RelPosAttention)
# What a model's tail consists of; one of the user's own may read any token.
_TAIL = ("forward", "forward_features", "forward_head", "pool", "_pool")


def reads_prefix(model: Any) -> bool:
    """Whether pooling takes prefix tokens alone."""
    return model.global_pool == "token" and getattr(model, "attn_pool", None) is None


def is_users_own(model: nn.Module) -> bool:
    """Whether a subclass or an instance has a forward or a tail of its own, which may read any token."""
    cls = getattr(type(model), "_tokenprune_original", type(model))
    return any(name in model.__dict__ or not _of_a_library(getattr(cls, name, None)) for name in _TAIL)


def prefix_tail(model: Any) -> Sequence[nn.Module] | None:
    """See `tokenprune.host.Host`. CaiT's class token is a query behind the last block, and reads all tokens there."""
    if isinstance(model, cait.Cait) or not reads_prefix(model):
        return None
    if is_users_own(model) or not _of_a_library(type(model.norm)):
        return None
    return [model.blocks, *model.blocks[-1].modules(), *model.norm.modules()]


def _of_a_library(part: Any) -> bool:
    return part is None or part.__module__.partition(".")[0] in ("timm", "torch")


def rotate(x: Tensor, table: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotary embedding of x [B, H, N, D] behind its `prefix` first tokens, by table [..., N - prefix, 2 D]."""
    return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=half)], 2)


class FrontAttention(Mixin):
    """An attention with queries of `front_here` alone, keys and values of all tokens."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        front = front_here(x)
        if front is x or not _projects_by_rows(self):
            return super().forward(x, **kwargs)
        bias = kwargs.get("attn_mask", kwargs.get("shared_rel_pos"))
        relative: Any = getattr(self, "rel_pos", None)
        if relative is not None:
            bias = relative.get_bias()
        return _attend(self, front, x, bias, kwargs.get("rope"))


@named_as(beit.Attention)
class FrontBeitAttention(ReindexedBeitAttention):
    """The same of BEiT's."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        front = front_here(x)
        if front is x or not _projects_by_rows(self):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return _attend(self, front, x, bias, None)


def front_swaps(block: Any, prefix: int) -> tuple[tuple[nn.Module, type[nn.Module]], ...]:
    """The block's attention with its class of this file, where there is one."""
    attention: Any = getattr(block, "attn", None)
    if getattr(attention, "num_prefix_tokens", prefix) != prefix:  # some queries in front would be rotated
        return ()
    if type(attention) is beit.Attention:
        return ((attention, FrontBeitAttention),)
    if type(attention) in _ATTENTIONS:
        return ((attention, mixed(FrontAttention, type(attention))),)
    return ()


def _projects_by_rows(attention: Any) -> bool:
    """Whether queries can be projected by themselves: a joint projection that is more than its weight (adapted,
    quantised, sharded, offloaded) must run whole."""
    joint = attention.qkv
    if joint is None:
        return True
    whole = type(joint) is not nn.Linear or is_traceable_wrapper_subclass(joint.weight)
    return not whole and "forward" not in joint.__dict__


def _attend(attention: Any, front: Tensor, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
    """The output [B, P, C] of an attention for the tokens front [B, P, C] of x [B, N, C].

    bias: additive, [B or 1, H or 1, N or 1, N]. rope: rotary table of the keys behind the prefix, whose own queries
    and keys are not rotated.
    """
    q, k, v = _projected(attention, front, x)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        half = bool(getattr(attention, "rotate_half", False))
        q, k = q.type_as(v), rotate(k, rope, attention.num_prefix_tokens, half).type_as(v)
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., : front.shape[1], :]
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        logits = (q * attention.scale) @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        out = attention.attn_drop(weights) @ v
    out = out.transpose(1, 2).flatten(2)
    if hasattr(attention, "norm"):
        out = attention.norm(out)
    if getattr(attention, "gate", None) is not None:
        out = out * attention.gate(front).sigmoid()
    result: Tensor = attention.proj_drop(attention.proj(out))
    return result


def _projected(attention: Any, front: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, P, D], keys and values [B, H, N, D]."""
    joint = attention.qkv
    if joint is None:
        q, k, v = attention.q_proj(front), attention.k_proj(x), attention.v_proj(x)
    else:
        bias = joint.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        width = joint.weight.shape[0] // 3
        q = F.linear(front, joint.weight[:width], None if bias is None else bias[:width])
        both = F.linear(x, joint.weight[width:], None if bias is None else bias[width:])
        k, v = both.chunk(2, -1)
    heads = attention.num_heads
    kv_heads = getattr(attention, "num_kv_heads", heads)
    return _by_head(q, heads), _by_head(k, kv_heads), _by_head(v, kv_heads)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).transpose(1, 2)
