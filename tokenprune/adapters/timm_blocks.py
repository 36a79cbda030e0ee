"""timm's blocks with a reduction point between attention and MLP, which leave off the tokens that nobody reads.

Each class runs its host's own submodules in the host's order; whether that still gives the host's output is checked
when a model is patched (`tokenprune.adapters.timm_vit`).
"""

from __future__ import annotations

from timm.models import beit, cait, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from tokenprune.adapters.swapping import Mixin, named_as
from tokenprune.here import front_here, own_bias_here, reduce_here


@named_as(vision_transformer.Block)
class MidBlock(vision_transformer.Block):
    """Pre-norm block: attention, reduction, MLP."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = front_here(x) + self.drop_path1(self.ls1(front_here(attended)))
        x = reduce_here(x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@named_as(vision_transformer.ResPostBlock)
class MidResPostBlock(vision_transformer.ResPostBlock):
    """Block normalised behind each layer."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(x, attn_mask=attn_mask, is_causal=is_causal)
        x = front_here(x) + self.drop_path1(self.norm1(front_here(attended)))
        x = reduce_here(x)
        return x + self.drop_path2(self.norm2(self.mlp(x)))


@named_as(eva.EvaBlock)
class MidEvaBlock(eva.EvaBlock):
    """EVA's pre-norm block, with layer scale on either branch, both or none."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        attended = front_here(self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal))
        x = front_here(x) + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        x = reduce_here(x)
        mapped = self.mlp(self.norm2(x))
        return x + self.drop_path2(mapped if self.gamma_2 is None else self.gamma_2 * mapped)


@named_as(eva.EvaBlockPostNorm)
class MidEvaBlockPostNorm(eva.EvaBlockPostNorm):
    """EVA's block normalised behind each layer."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        attended = self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        x = front_here(x) + self.drop_path1(self.norm1(front_here(attended)))
        x = reduce_here(x)
        return x + self.drop_path2(self.norm2(self.mlp(x)))


@named_as(beit.Block)
class MidBeitBlock(beit.Block):
    """BEiT's block."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        attended = front_here(self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias))
        x = front_here(x) + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        x = reduce_here(x)
        mapped = self.mlp(self.norm2(x))
        return x + self.drop_path2(mapped if self.gamma_2 is None else self.gamma_2 * mapped)


@named_as(cait.LayerScaleBlock)
class MidLayerScaleBlock(cait.LayerScaleBlock):
    """CaiT's block of patch tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        x = reduce_here(x)
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


@named_as(vision_transformer_relpos.RelPosBlock)
class MidRelPosBlock(vision_transformer_relpos.RelPosBlock):
    """Pre-norm block with relative position bias."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        attended = self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos)
        x = front_here(x) + self.drop_path1(self.ls1(front_here(attended)))
        x = reduce_here(x)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@named_as(vision_transformer_relpos.ResPostRelPosBlock)
class MidResPostRelPosBlock(vision_transformer_relpos.ResPostRelPosBlock):
    """Block with relative position bias, normalised behind each layer."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        attended = self.attn(x, shared_rel_pos=shared_rel_pos)
        x = front_here(x) + self.drop_path1(self.norm1(front_here(attended)))
        x = reduce_here(x)
        return x + self.drop_path2(self.norm2(self.mlp(x)))


@named_as(beit.Attention)
class ReindexedBeitAttention(beit.Attention):
    """BEiT's attention, its position bias taken at the tokens that are left."""

    def _get_rel_pos_bias(self) -> Tensor:
        return own_bias_here(super()._get_rel_pos_bias())


class ReindexedBias(Mixin):
    """A relative position bias of one attention, taken at the tokens that are left."""

    def get_bias(self) -> Tensor:
        return own_bias_here(super().get_bias())  # type: ignore[misc]


MID_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    mid._tokenprune_original: mid
    for mid in (
        MidBlock,
        MidResPostBlock,
        MidEvaBlock,
        MidEvaBlockPostNorm,
        MidBeitBlock,
        MidLayerScaleBlock,
        MidRelPosBlock,
        MidResPostRelPosBlock,
    )
}
