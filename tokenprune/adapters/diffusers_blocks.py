"""The table of diffusers' transformer blocks: what each takes, what it returns, and what is indexed by token in it.

One row a class is all that a block needs; a class is recognised by its name and the parameters of its forward, so that
a block that changed is refused and not guessed at.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapters.beneath import expose, original_class, token_block
from tokenprune.adapters.diffusers_rotary import (
    Rotate,
    Tables,
    complex_rows,
    last_rows,
    rotation,
    rows_by_head,
    whole_width,
)
from tokenprune.denoisers.host import Arguments, BlockFacts, CrossFacts, Slice
from tokenprune.errors import UnsupportedModel
from tokenprune.kernels.merge import gather


@dataclass(frozen=True)
class Row:
    """Facts of one block class.

    parameters: of its forward. attention: attribute with the self-attention. returned: index of the image tokens in the
    output, None where they are the output. text: whether text tokens are concatenated in the attention. text_first:
    whether to_q puts out the text in front of the image. slices: see BlockFacts. shared: whether all images of a batch
    must compute the same tokens. rotary: (argument, its tables, whether halves of a head's channels are pairs) of the
    rotary embedding. cross: attribute with the cross-attention; text_bias: argument with the bias of its keys. context:
    attributes with self-attentions that take fewer queries than keys. attentions, mlp: attributes with parts whose
    output can be kept from step to step.
    """

    parameters: tuple[str, ...]
    attention: str
    returned: int | None = None
    text: bool = False
    text_first: bool = False
    slices: tuple[tuple[str, Slice], ...] = ()
    shared: bool = False
    rotary: tuple[str, Tables, bool] | None = None
    cross: str | None = None
    text_bias: str | None = None
    context: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    mlp: str | None = None


def table_rows(table: Any, index: Tensor, tokens: int, text: int, *, after_text: bool = False) -> Any:
    """Rows of rotary tables [N, ...] (one, or a tuple of them), or of [T + N, ...] where text stands in front.

    CogView4 makes its tables on the CPU, and moves them where they are used.
    """
    if isinstance(table, tuple | list):
        return tuple(table_rows(part, index, tokens, text, after_text=after_text) for part in table)
    table = table.to(index.device)
    if after_text:
        start = table.shape[0] - tokens
        return torch.cat([table[:start], table[start:].index_select(0, index[0])])
    return table.index_select(0, index[0])


def batched_rows(table: Any, index: Tensor, tokens: int, text: int) -> Any:
    """Rows of tables [1 or B, N, ...] (one, or a tuple); what has one row for all tokens stays."""
    if isinstance(table, tuple | list):
        return tuple(batched_rows(part, index, tokens, text) for part in table)
    if table.shape[1] != tokens:
        return table
    return gather(table, index) if table.shape[0] > 1 else table.index_select(1, index[0])


def embedding_rows(embedding: Tensor, index: Tensor, tokens: int, text: int) -> Tensor:
    """A timestep embedding of each token [B, N, 6, C]; one for the image [B, 6, C] stays."""
    return batched_rows(embedding, index, tokens, text) if embedding.ndim == 4 else embedding


def first_rows(tables: Any, index: Tensor, tokens: int, text: int) -> Any:
    """Rotary tables (image [N, D], text [T, D])."""
    image, *others = tables
    return (table_rows(image, index, tokens, text), *others)


def mask_columns(mask: Tensor, index: Tensor, tokens: int, text: int) -> Tensor:
    """A mask or bias of the keys [..., N + T], the image in front; what has one entry for all stays."""
    if mask.shape[-1] < tokens:
        return mask
    columns = mask[..., :tokens].index_select(-1, index[0])
    return torch.cat([columns, mask[..., tokens:]], -1)


_WAN = Row(
    ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"),
    "attn1",
    slices=(("temb", embedding_rows), ("rotary_emb", batched_rows)),
    shared=True,
    rotary=("rotary_emb", rows_by_head, False),
    cross="attn2",
)
_PAIRS = ("image_rotary_emb", last_rows, False)
_FLUX = Row(
    ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"),
    "attn",
    returned=1,
    text=True,
    slices=(("image_rotary_emb", partial(table_rows, after_text=True)),),
    shared=True,
    rotary=_PAIRS,
    context=("attn",),
)
_HUNYUAN = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")

ROWS: dict[str, Row] = {
    "BasicTransformerBlock": Row(
        (
            "hidden_states",
            "attention_mask",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "timestep",
            "cross_attention_kwargs",
            "class_labels",
            "added_cond_kwargs",
        ),
        "attn1",
        cross="attn2",
        text_bias="encoder_attention_mask",
        context=("attn1",),
        attentions=("attn1", "attn2"),
        mlp="ff",
    ),
    "JointTransformerBlock": Row(
        ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"),
        "attn",
        returned=1,
        text=True,
        context=("attn", "attn2"),
        attentions=("attn", "attn2"),
        mlp="ff",
    ),
    "FluxTransformerBlock": _FLUX,
    "FluxSingleTransformerBlock": replace(_FLUX, text_first=True),
    "WanTransformerBlock": _WAN,
    "LTXVideoTransformerBlock": Row(
        ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
        "attn1",
        slices=(("temb", batched_rows), ("image_rotary_emb", batched_rows)),
        shared=True,
        rotary=("image_rotary_emb", whole_width, False),
        cross="attn2",
        text_bias="encoder_attention_mask",
    ),
    "CogVideoXBlock": Row(
        ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "attention_kwargs"),
        "attn1",
        returned=0,
        text=True,
        text_first=True,
        slices=(("image_rotary_emb", table_rows),),
        shared=True,
        rotary=_PAIRS,
    ),
    "CogView3PlusTransformerBlock": Row(
        ("hidden_states", "encoder_hidden_states", "emb"), "attn1", returned=0, text=True, text_first=True
    ),
    "CogView4TransformerBlock": Row(
        ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "attention_mask", "attention_kwargs"),
        "attn1",
        returned=0,
        text=True,
        text_first=True,
        slices=(("image_rotary_emb", table_rows),),
        shared=True,
        rotary=("image_rotary_emb", last_rows, True),
    ),
    "HunyuanVideoTransformerBlock": Row(
        (*_HUNYUAN, "freqs_cis"),
        "attn",
        returned=0,
        text=True,
        slices=(("attention_mask", mask_columns), ("freqs_cis", table_rows)),
        shared=True,
        rotary=("freqs_cis", last_rows, False),
    ),
    "HunyuanVideoSingleTransformerBlock": Row(
        (*_HUNYUAN, "image_rotary_emb"),
        "attn",
        returned=0,
        text=True,
        slices=(("attention_mask", mask_columns), ("image_rotary_emb", table_rows)),
        shared=True,
        rotary=_PAIRS,
    ),
    "QwenImageTransformerBlock": Row(
        (
            "hidden_states",
            "encoder_hidden_states",
            "encoder_hidden_states_mask",
            "temb",
            "image_rotary_emb",
            "joint_attention_kwargs",
            "modulate_index",
        ),
        "attn",
        returned=1,
        text=True,
        slices=(("image_rotary_emb", first_rows), ("modulate_index", batched_rows)),
        shared=True,
        rotary=("image_rotary_emb", complex_rows, False),
    ),
}

REFUSED = {
    "SanaTransformerBlock": "its feed-forward is a convolution over the full grid",
    "SanaVideoTransformerBlock": "its feed-forward is a convolution over the full grid",
    "HunyuanDiTBlock": "long skips join blocks of different depth",
}
"""Blocks that cannot compute fewer tokens, and why."""


def block_facts(name: str, block: nn.Module) -> tuple[BlockFacts, bool]:
    """The facts of one block, and whether all images of a batch must compute the same tokens in it.

    Raises:
        UnsupportedModel: its class is not in the table, or not as the table knows it.
    """
    cls = original_class(block)
    row = ROWS.get(cls.__name__)
    if row is None:
        why = REFUSED.get(cls.__name__, "it is not known what is indexed by token there")
        raise UnsupportedModel(f"{name} is a {cls.__name__}: {why}; known blocks: {', '.join(sorted(ROWS))}")
    parameters = tuple(inspect.signature(cls.forward).parameters)[1:]
    if parameters[: len(row.parameters)] != row.parameters:
        raise UnsupportedModel(
            f"{name}: the forward of {cls.__name__} takes {parameters}, and {row.parameters} is what is known of it"
        )
    if getattr(block, "pos_embed", None) is not None:
        raise UnsupportedModel(
            f"{name} adds positions by a token's place in the sequence, so that none can be left out"
        )
    attention: Any = getattr(block, row.attention)
    heads = attention.heads
    before = before_basic if cls.__name__ == "BasicTransformerBlock" and _plain(block) else None
    facts = BlockFacts(
        name=name,
        module=block,
        arguments=parameters,
        hidden="hidden_states",
        text="encoder_hidden_states" if row.text else None,
        returned=row.returned,
        slices=row.slices,
        queries=_output_of(attention, "q"),
        keys=_output_of(attention, "k"),
        heads=heads,
        scale=_scale(attention),
        text_first=row.text_first,
        before=before,
        rotate=partial(_rotate, row.rotary, heads),
        cross=_cross(block, row),
        parts=_parts(block) if cls.__name__ == "BasicTransformerBlock" else {},
        fused=is_fused,
        swapped=token_block(cls),
        context=_context(block, row),
        rotary=row.rotary[0] if row.rotary and row.context else None,
        attentions=tuple(part for name in row.attentions if (part := getattr(block, name, None)) is not None),
        mlp=getattr(block, row.mlp) if row.mlp and getattr(block, "_chunk_size", None) is None else None,
        expose=expose,
    )
    return facts, row.shared


def _context(block: Any, row: Row) -> tuple[nn.Module, ...]:
    attentions = [part for name in row.context if (part := getattr(block, name, None)) is not None]
    if getattr(block, "only_cross_attention", False) or any(map(is_fused, attentions)):
        return ()
    return tuple(projection for attention in attentions for projection in (attention.to_k, attention.to_v))


def before_basic(module: nn.Module, bound: Arguments) -> tuple[Tensor, Tensor]:
    """Queries and keys of a BasicTransformerBlock's self-attention, from its arguments."""
    block: Any = module
    x: Tensor = bound["hidden_states"]
    if block.norm_type == "ada_norm_zero":
        normed = block.norm1(x, bound["timestep"], bound["class_labels"], hidden_dtype=x.dtype)[0]
    elif block.norm_type == "ada_norm_single":
        shift, scale = (block.scale_shift_table[None] + bound["timestep"].reshape(x.shape[0], 6, -1))[:, :2].unbind(1)
        normed = block.norm1(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    else:
        normed = block.norm1(x)
    return block.attn1.to_q(normed), block.attn1.to_k(normed)


def _rotate(rotary: tuple[str, Tables, bool] | None, heads: int, bound: Arguments, tokens: int) -> Rotate | None:
    if rotary is None:
        return None
    argument, tables, halves = rotary
    return rotation(tables, halves, bound.get(argument), tokens, heads)


def _parts(block: Any) -> dict[str, nn.Module]:
    """See BlockFacts. The other classes attend to text and image at once, or to rotary tables by token."""
    parts = {"attention": block.attn1, "mlp": block.ff}
    if block.attn2 is not None:
        parts["cross"] = block.attn2
    if not block.only_cross_attention and getattr(block.attn1, "norm_cross", None) is None:
        parts["keys"] = block.attn1
    return parts


def is_fused(attention: nn.Module) -> bool:
    """Whether an attention's projections are fused."""
    if type(attention).__name__ == "Attention":  # its flag stays set when it is unfused, its processor does not
        return type(attention.processor).__name__.startswith("Fused")
    return bool(getattr(attention, "fused_projections", False))


def _cross(block: Any, row: Row) -> CrossFacts | None:
    attention = getattr(block, row.cross, None) if row.cross is not None else None
    if attention is None or not getattr(attention, "is_cross_attention", True):
        return None
    return CrossFacts(
        _output_of(attention, "q"), _output_of(attention, "k"), attention.heads, _scale(attention), row.text_bias
    )


def _scale(attention: Any) -> float:
    width = attention.to_q.weight.shape[0] if hasattr(attention.to_q, "weight") else attention.to_q.out_features
    return (width // attention.heads) ** -0.5


def _plain(block: Any) -> bool:
    known = block.norm_type in ("layer_norm", "ada_norm_zero", "ada_norm_single")
    return known and not block.only_cross_attention and getattr(block.attn1, "norm_q", None) is None


def _output_of(attention: Any, which: str) -> nn.Module | None:
    """Where queries or keys come out on their own: behind their norm, where there is one; None where a fused projection
    puts them out with others."""
    norm = getattr(attention, f"norm_{which}", None)
    if isinstance(norm, nn.Module):
        return norm
    return None if is_fused(attention) else getattr(attention, f"to_{which}")
