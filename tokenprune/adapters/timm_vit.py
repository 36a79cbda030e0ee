"""timm's vision transformers: VisionTransformer (DeiT, hybrids), BEiT, EVA, relative-position, CaiT and NaFlexViT."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.models import beit, cait, eva, naflexvit, vision_transformer, vision_transformer_relpos
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.adapters.swapping import Mixin, mixed
from tokenprune.adapters.timm_blocks import MID_BLOCKS, ReindexedBeitAttention, ReindexedBias
from tokenprune.adapters.timm_prefix import front_swaps, is_users_own, prefix_tail, reads_prefix, rotate
from tokenprune.adapters.timm_ragged import ragged_facts
from tokenprune.errors import UnsupportedModel, unknown_module
from tokenprune.host import BlockHost, Caught, Host, tokens_first
from tokenprune.ragged_blocks import head_by_length
from tokenprune.registry import register_adapter
from tokenprune.state import Entry, flow

PLAIN_VITS = (
    vision_transformer.VisionTransformer,
    beit.Beit,
    eva.Eva,
    vision_transformer_relpos.VisionTransformerRelPos,
    cait.Cait,
    naflexvit.NaFlexVit,
)
_RELPOS_BLOCKS = (vision_transformer_relpos.RelPosBlock, vision_transformer_relpos.ResPostRelPosBlock)
_PARALLEL_BLOCKS = (vision_transformer.ParallelScalingBlock, vision_transformer.DiffParallelScalingBlock)
_MASKED_ATTENTIONS = (Attention, AttentionRope, eva.EvaAttention, DiffAttention)


class DenseOutputs(Mixin):
    """Entry points whose outputs are read token by token, and so are restored to the full grid."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward_features  # type: ignore[misc]
        entry = flow().entry
        if entry is not None and entry.whole:
            entry.whole = False
            if torch.compiler.is_compiling():  # in the model's own hook it would be a graph for each size
                entry.grid = _grid_of(self, *args, **kwargs)
            return run(*args, **kwargs)
        return _dense(self, (len(self.blocks) - 1,), run, *args, **kwargs)  # type: ignore[arg-type]

    def forward_intermediates(self, x: Any, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        depth = len(self.blocks)  # type: ignore[arg-type]
        wanted = (*feature_take_indices(depth, indices)[0], depth - 1)
        return _dense(self, wanted, super().forward_intermediates, x, indices, *args, **kwargs)  # type: ignore[misc]

    def forward_head(self, *args: Any, **kwargs: Any) -> Tensor:
        head = super().forward_head  # type: ignore[misc]
        entry = flow().entry
        pack = entry.pack if entry is not None else None
        if pack is None or reads_prefix(self):
            return head(*args, **kwargs)
        return head_by_length(lambda images: head(images, *args[1:], **kwargs), args[0], pack)


def _dense(model: nn.Module, blocks: tuple[int, ...], run: Any, *args: Any, **kwargs: Any) -> Any:
    flow().start(Entry(blocks, whole=False, grid=_grid_of(model, *args, **kwargs)))
    try:
        return run(*args, **kwargs)
    finally:
        flow().end()


@register_adapter
class TimmVisionTransformer:
    """See `tokenprune.host.Adapter`."""

    name = "timm_vit"

    def find(self, target: object) -> nn.Module | None:
        assert isinstance(target, nn.Module)
        found = [module for module in target.modules() if isinstance(module, PLAIN_VITS)]
        if len(found) > 1:
            raise UnsupportedModel(
                f"{type(target).__name__} holds {len(found)} vision transformers; patch each of them by itself"
            )
        return found[0] if found else None

    def host(self, model: nn.Module) -> Host:
        parts: Any = model
        grid = _grid(model)
        in_blocks = 0 if isinstance(model, cait.Cait) else int(parts.num_prefix_tokens)
        return Host(
            model=model,
            blocks=[
                _block(f"blocks.{i}", block, int(parts.embed_dim), in_blocks, grid[0] * grid[1])
                for i, block in enumerate(parts.blocks)
            ],
            num_prefix_tokens=in_blocks,
            tokens=grid[0] * grid[1],
            grid=grid,
            grid_of=_grid_of,
            example=partial(_example, model),
            ragged_head=True,
            has_class_token=in_blocks > 0 and _has_class_token(model),
            restored=_restored,
            prefix_tail=prefix_tail,
            swaps=((model, mixed(DenseOutputs, type(model))),),
        )


def _has_class_token(model: Any) -> bool:
    embeds = getattr(model, "embeds", model)
    return getattr(embeds, "cls_token", None) is not None


def _restored(model: Any, merges: bool, _: dict[str, Any]) -> tuple[int, ...]:
    """The last block that the model still has, where what follows it in a forward reads the full grid."""
    return (len(model.blocks) - 1,) if _needs_grid(model, merges) else ()


def _needs_grid(model: Any, merges: bool) -> bool:
    """Whether what follows the blocks in a forward reads patch tokens as the full grid."""
    if is_users_own(model):
        return True
    if getattr(model, "attn_pool", None) is not None:
        return merges or getattr(model.attn_pool, "pos_embed", None) is not None
    if model.global_pool == "token" and not isinstance(model, cait.Cait):
        return False
    return merges or not model.global_pool


def _image_size(model: Any) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = model.pretrained_cfg["input_size"][-2:]
    return int(size[0]), int(size[1])


def _grid(model: Any) -> tuple[int, int]:
    embed: Any = getattr(model, "patch_embed", None)
    # Where images are padded to whole patches, the embedding's own size has only those without padding.
    if getattr(embed, "grid_size", None) is not None and not getattr(embed, "dynamic_img_pad", False):
        return int(embed.grid_size[0]), int(embed.grid_size[1])
    return _grid_at(model, _image_size(model))


def _grid_at(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    embed = getattr(model, "patch_embed", None) or model.embeds
    if not hasattr(embed, "dynamic_feat_size"):  # an embedding of the user's own, of one size
        return int(embed.grid_size[0]), int(embed.grid_size[1])
    rows, columns = embed.dynamic_feat_size(size)
    return rows, columns


def _grid_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
    """The grid of an image, by whichever entry point it comes; NaFlexViT also takes patches, which fill none."""
    image = args[0] if args else kwargs.get("x", kwargs.get("patches"))
    if not isinstance(image, Tensor) or image.ndim != 4:
        return None
    return _grid_at(model, (image.shape[-2], image.shape[-1]))


def _example(model: nn.Module) -> Tensor:
    reference = next(p for p in model.parameters() if p.is_floating_point())
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    inner: Any = model
    channels = conv.in_channels if conv is not None else int(inner.pretrained_cfg["input_size"][0])
    return torch.empty(1, channels, *_image_size(model), device=reference.device, dtype=reference.dtype)


def _block(name: str, block: nn.Module, width: int, prefix: int, tokens: int) -> BlockHost:
    facts = BlockHost(name, block, width=width)
    inner: Any = block
    if isinstance(block, _PARALLEL_BLOCKS):
        facts.taps = (("queries", inner.q_norm), ("keys", inner.k_norm))
        if isinstance(block, vision_transformer.ParallelScalingBlock):
            facts.read = tokens_first
        facts.scale = inner.scale
        facts.mask_argument = facts.key_bias = "attn_mask"
        facts.takes_bias = True
        facts.mid_refused = "its attention and MLP run in parallel"
    elif isinstance(block, vision_transformer.ParallelThingsBlock):
        _masked_attention(facts, inner.attns[-1].attn, prefix)
        facts.mid_refused = "its attentions and MLPs run in parallel"
    elif isinstance(block, beit.Block):
        _beit_attention(facts, inner.attn)
        facts.check_tokens = tokens
    elif isinstance(block, cait.LayerScaleBlock):
        _talking_heads(facts, inner.attn)
    elif isinstance(block, _RELPOS_BLOCKS):
        _relpos_attention(facts, inner.attn)
        facts.check_tokens = tokens
    elif hasattr(block, "attn"):
        _masked_attention(facts, inner.attn, prefix)
        if isinstance(block, eva.EvaBlock | eva.EvaBlockPostNorm):
            facts.rope_argument = "rope"
    else:
        raise unknown_module(block)
    facts.mid = MID_BLOCKS.get(type(block))
    if facts.mid is None and not facts.mid_refused:
        facts.mid_refused = f"{type(block).__name__} is not a block whose parts are known"
    ragged_facts(facts)
    facts.front_swaps = front_swaps(block, prefix)
    return facts


def _masked_attention(facts: BlockHost, attention: Any, prefix: int) -> None:
    if not isinstance(attention, _MASKED_ATTENTIONS):
        raise unknown_module(attention)
    facts.taps = (("queries", attention.q_norm), ("keys", attention.k_norm))
    facts.scale = float(attention.scale)
    facts.mask_argument = facts.key_bias = "attn_mask"
    facts.takes_bias = True
    facts.rotate = partial(rotate, prefix=prefix, half=bool(getattr(attention, "rotate_half", False)))


def _beit_attention(facts: BlockHost, attention: Any) -> None:
    if not isinstance(attention, beit.Attention):
        raise unknown_module(attention)
    facts.taps = (("inputs", attention),)
    facts.read = _project
    facts.scale = float(attention.scale)
    facts.bias_arguments = ("shared_rel_pos_bias",)
    facts.takes_bias = True
    if attention.relative_position_bias_table is not None:
        facts.swaps = ((attention, ReindexedBeitAttention),)
    else:
        facts.key_bias = "shared_rel_pos_bias"


def _project(queries: Tensor | None, keys: Tensor | None, inputs: Caught | None) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys once more from the attention's input: BEiT's exposes neither."""
    assert inputs is not None
    attention: Any = inputs[0]
    x = inputs[1]
    rows = 2 * attention.qkv.weight.shape[0] // 3
    bias = None if attention.q_bias is None else torch.cat((attention.q_bias, attention.k_bias))
    both = F.linear(x, attention.qkv.weight[:rows], bias)
    both = both.reshape(*x.shape[:2], 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return both[0], both[1]


def _talking_heads(facts: BlockHost, attention: Any) -> None:
    if not isinstance(attention, cait.TalkingHeadAttn):
        raise unknown_module(attention)
    facts.taps = (("queries", attention.qkv), ("keys", attention.qkv))
    facts.read = partial(_split, attention.num_heads)
    facts.scale = float(attention.scale)


def _split(
    heads: int, queries: Tensor | None, keys: Tensor | None, inputs: Caught | None
) -> tuple[Tensor | None, Tensor | None]:
    """Queries and keys out of the fused projection, before CaiT mixes the heads."""
    assert keys is not None
    parts = keys.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-untyped-call]
    return parts[0], parts[1]


def _relpos_attention(facts: BlockHost, attention: Any) -> None:
    if not isinstance(attention, vision_transformer_relpos.RelPosAttention):
        raise unknown_module(attention)
    facts.taps = (("queries", attention.q_norm), ("keys", attention.k_norm))
    facts.scale = float(attention.scale)
    facts.bias_arguments = ("shared_rel_pos",)
    facts.takes_bias = True
    if attention.rel_pos is not None:
        facts.swaps = ((attention.rel_pos, mixed(ReindexedBias, type(attention.rel_pos))),)
    else:
        facts.key_bias = "shared_rel_pos"
