"""One small timm model for each way in which a block, its attention or what follows differs between families."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from tokenprune.state import TokenState

FAMILIES = {
    "class_token": "vit_tiny_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "distilled": "deit_tiny_distilled_patch16_224",
    "map_pool": "vit_base_patch16_siglip_224",
    "mean_pool": "vit_base_patch16_siglip_gap_224",
    "rotary": "eva02_tiny_patch14_224",
    "rotary_registers": "vit_small_patch16_dinov3",
    "rotary_mixed": "vit_small_patch16_rope_mixed_224",
    "bias_own_table": "beit_base_patch16_224",
    "bias_own_mlp": "vit_relpos_small_patch16_224",
    "bias_shared": "vit_srelpos_small_patch16_224",
    "talking_heads": "cait_xxs24_224",
    "naflex": "naflexvit_base_patch16_gap",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "post_norm": "vit_base_patch16_rpn_224",
    "parallel_scaling": "vit_pwee_patch16_reg1_gap_256",
    "parallel_things": "vit_small_patch16_18x2_224",
    "differential": "vit_dwee_patch16_reg1_gap_256",
    "differential_parallel": "vit_dpwee_patch16_reg1_gap_256",
}
# For what the block's inside does not decide: prefix, rotary tables, a bias that is computed inside, no prefix.
FEW = ("class_token", "rotary_registers", "bias_own_table", "map_pool")
# All run on every family with an option or two; cait's talking heads take no bias.
FIRST_METHODS = ("random", "uniform", "top_k", "evit", "tome", "zero_tprune", "zero_tprune_uni")
METHODS = (*FIRST_METHODS, "k_medoids", "dpc_knn", "pitome", "tofu", "diffrate", "pomt")
PROPORTIONAL = ("tome", "pitome", "tofu", "diffrate")


def full_but(fast: Container[Any], names: Iterable[Any]) -> list[Any]:
    """`names` as parameters, of which only the `fast` ones are in the fast tests."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.full) for name in names]


def build(family: str) -> nn.Module:
    """The model in eval mode: 4 blocks on a grid of 5 x 7 patches, the same weights on each call."""
    return zoo.create(FAMILIES[family])


def images(model: nn.Module, batch: int = 2, seed: int = 0) -> Tensor:
    """[B, 3, H, W] of the model's usual size, image i the same in every batch."""
    size = model.pretrained_cfg["input_size"]
    return torch.stack(
        [torch.randn(*size, generator=torch.Generator().manual_seed(100 * seed + i)) for i in range(batch)]
    )


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The plain output, without gradients."""
    with torch.no_grad():
        output: Tensor = model(x)
    return output


def options(family: str, method: str) -> dict[str, bool]:
    """What `method` needs to work on `family`."""
    return {"proportional": False} if family == "talking_heads" and method in PROPORTIONAL else {}


def states_in_memory() -> int:
    """How many states of forwards are still held by anything."""
    gc.collect()
    return sum(type(held) is TokenState for held in gc.get_objects())


def patches(model: nn.Module) -> int:
    """Prunable tokens of the model's usual image."""
    embed = getattr(model, "patch_embed", None) or model.embeds
    rows, columns = embed.dynamic_feat_size(model.pretrained_cfg["input_size"][-2:])
    return int(rows * columns)
