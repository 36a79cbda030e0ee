"""timm's modules on batches whose images keep different numbers of tokens (see `tokenprune.ragged`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import beit, cait, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.adapters.ragged import RaggedDropPath
from tokenprune.adapters.swapping import Mixin, mixed, named_as
from tokenprune.adapters.timm_blocks import ReindexedBeitAttention
from tokenprune.host import BlockHost
from tokenprune.ragged_attention import attend_here


class RaggedAttention(Mixin):
    """An attention, or a block that holds its own, whose tokens see those of their own image."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return attend_here(super().forward, x, **kwargs)


@named_as(beit.Attention)
class RaggedBeitAttention(ReindexedBeitAttention):
    """The same for BEiT's, whose position bias is re-indexed too."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return attend_here(super().forward, x, **kwargs)


def ragged_facts(facts: BlockHost) -> None:
    """Fill in what a block needs for ragged batches; CaiT's is left without, its class token comes in after them."""
    block: Any = facts.module
    if isinstance(block, cait.LayerScaleBlock):
        return
    if isinstance(block, vision_transformer.ParallelThingsBlock):
        facts.attentions = tuple(branch.attn for branch in block.attns)
    else:
        facts.attentions = (getattr(block, "attn", block),)
    kept = [(module, swapped) for module, swapped in facts.swaps if not isinstance(module, beit.Attention)]
    facts.ragged_swaps = (
        *kept,
        *((attention, _ragged(attention)) for attention in facts.attentions),
        *((module, mixed(RaggedDropPath, DropPath)) for module in block.modules() if type(module) is DropPath),
    )
    facts.rope_identity = _no_rotation if facts.rope_argument is not None else None
    _values(facts, facts.attentions[-1])


def _ragged(attention: nn.Module) -> type[nn.Module]:
    return RaggedBeitAttention if type(attention) is beit.Attention else mixed(RaggedAttention, type(attention))


def _no_rotation(table: Tensor) -> Tensor:
    """The rotary row of angle zero: timm's tables hold sines, then cosines."""
    half = table.shape[-1] // 2
    return torch.cat([table.new_zeros(half), table.new_ones(half)])


def _values(facts: BlockHost, attention: Any) -> None:
    """Where values come by: the end of a joint projection or one of their own, or, where no module puts them out, the
    attention's input, from which they are projected once more."""
    if isinstance(attention, beit.Attention) or getattr(attention, "q_bias", None) is not None:
        tap, module, facts.values = "value_inputs", attention, _project
    else:
        tap, heads = "values", getattr(attention, "num_kv_heads", attention.num_heads)
        if getattr(attention, "v_proj", None) is not None:
            module, width = attention.v_proj, None
        elif hasattr(attention, "in_split"):
            module, width = attention.in_proj, attention.in_split[-1]
        else:
            module, width = attention.qkv, None
        facts.values = partial(_last, heads, width, 1 if module is getattr(attention, "v_proj", None) else 3)
    facts.taps += ((tap, module),)


def _last(heads: int, width: int | None, parts: int, module: nn.Module, output: Tensor) -> Tensor:
    """[B, H, N, D] out of the last `width` channels of a projection [B, N, ...], None for the last of equal `parts`."""
    width = output.shape[-1] // parts if width is None else width
    return output[..., -width:].unflatten(-1, (heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]


def _project(attention: Any, x: Tensor) -> Tensor:
    rows = attention.qkv.weight.shape[0] // 3
    return _last(attention.num_heads, rows, 1, attention, F.linear(x, attention.qkv.weight[-rows:], attention.v_bias))
