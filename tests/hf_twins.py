"""Pairs of a timm and a transformers model with the same weights, which give the same output."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
import transformers
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

OBLONG = {**tiny_models.SHAPE, "depth": 4}
SQUARE = {**OBLONG, "img_size": 24}
PAIRS = ("vit", "clip", "siglip", "dinov2_registers", "beit", "internvl", "idefics3")


def _config(shape: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "image_size": shape["img_size"],
        "patch_size": shape["patch_size"],
        "layer_norm_eps": 1e-6,
        **more,
    }


def _empty(kind: str) -> tuple[nn.Module, nn.Module]:
    wide = {"intermediate_size": 96}
    if kind == "vit":  # of 7 x 5 patches
        config: Any = transformers.ViTConfig(**_config(OBLONG, num_labels=10, **wide))
        return VisionTransformer(**OBLONG), transformers.ViTForImageClassification(config)
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**_config(SQUARE, **wide))
        original: nn.Module = VisionTransformer(**SQUARE, pre_norm=True, act_layer="quick_gelu")
        return original, transformers.CLIPVisionModel(config)
    if kind in ("siglip", "idefics3"):
        kwargs: dict[str, Any] = {
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "act_layer": "gelu_tanh",
        }
        original = VisionTransformer(**SQUARE, **kwargs)
        if kind == "idefics3":
            config = transformers.models.idefics3.Idefics3VisionConfig(**_config(SQUARE, **wide))
            return original, transformers.Idefics3VisionTransformer(config)
        config = transformers.SiglipVisionConfig(**_config(SQUARE, vision_use_head=False, **wide))
        return original, transformers.SiglipVisionModel(config)
    if kind == "internvl":
        config = transformers.InternVLVisionConfig(
            **_config(SQUARE, use_mean_pooling=False, attention_bias=True, **wide)
        )
        return VisionTransformer(**SQUARE, init_values=1.0), transformers.InternVLVisionModel(config)
    if kind == "dinov2_registers":
        config = transformers.Dinov2WithRegistersConfig(**_config(SQUARE, num_register_tokens=4, mlp_ratio=2))
        kwargs = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0}
        return VisionTransformer(**SQUARE, **kwargs), transformers.Dinov2WithRegistersModel(config)
    config = transformers.BeitConfig(**_config(SQUARE, use_relative_position_bias=True, use_mean_pooling=False, **wide))
    kwargs = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 1.0, "global_pool": "token"}
    return Beit(**SQUARE, **kwargs), transformers.BeitModel(config)


def build(kind: str) -> tuple[nn.Module, nn.Module]:
    """The pair in double precision and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original, twin = _empty(kind)
        for name, parameter in original.named_parameters():
            if ("norm" in name and name.endswith("weight")) or "gamma" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("weight"):
                nn.init.normal_(parameter, std=(1.6 if "qkv" in name else 1.0) * parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.5)
    original, twin = original.double().eval(), twin.double().eval()
    _copy(original, twin)
    return original, twin


@torch.no_grad()
def _copy(original: Any, twin: Any) -> None:
    tower = twin.vit if hasattr(twin, "vit") else twin
    embeddings = tower.embeddings
    conv = next(module for module in embeddings.modules() if isinstance(module, nn.Conv2d))
    _set(conv, original.patch_embed.proj)
    position = original.pos_embed
    for name in ("class_embedding", "cls_token", "register_tokens"):
        if hasattr(embeddings, name):
            tokens = original.reg_token if name == "register_tokens" else original.cls_token
            getattr(embeddings, name).copy_(tokens.reshape(getattr(embeddings, name).shape))
    if hasattr(embeddings, "position_embedding"):
        embeddings.position_embedding.weight.copy_(position[0])
    elif getattr(embeddings, "position_embeddings", None) is not None:
        prefix = embeddings.position_embeddings.shape[1] - position.shape[1]
        embeddings.position_embeddings.copy_(nn.functional.pad(position, (0, 0, prefix, 0)))
    layers = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    for block, layer in zip(original.blocks, layers, strict=True):
        _copy_block(block, layer)
    final = next(getattr(tower, n) for n in ("layernorm", "post_layernorm") if hasattr(tower, n))
    _set(final, original.norm)
    if hasattr(tower, "pre_layrnorm"):
        _set(tower.pre_layrnorm, original.norm_pre)
    if hasattr(twin, "classifier"):
        _set(twin.classifier, original.head)


def _copy_block(block: Any, layer: Any) -> None:
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
    weights = block.attn.qkv.weight.chunk(3)
    if block.attn.qkv.bias is not None:
        biases: Any = block.attn.qkv.bias.chunk(3)
    else:
        biases = (block.attn.q_bias, None, block.attn.v_bias)
    for projection, weight, bias in zip(
        (attention.q_proj, attention.k_proj, attention.v_proj), weights, biases, strict=True
    ):
        projection.weight.copy_(weight)
        if bias is not None:
            projection.bias.copy_(bias)
    outputs = ("o_proj", "out_proj", "projection_layer")
    _set(next(getattr(attention, name) for name in outputs if hasattr(attention, name)), block.attn.proj)
    norms = ("norm1", "norm2"), ("layer_norm1", "layer_norm2"), ("layernorm_before", "layernorm_after")
    first, second = next(pair for pair in norms if hasattr(layer, pair[0]))
    _set(getattr(layer, first), block.norm1)
    _set(getattr(layer, second), block.norm2)
    _set(layer.mlp.fc1, block.mlp.fc1)
    _set(layer.mlp.fc2, block.mlp.fc2)
    if hasattr(layer, "layer_scale1"):
        layer.layer_scale1.lambda1.copy_(block.ls1.gamma)
        layer.layer_scale2.lambda1.copy_(block.ls2.gamma)
    if hasattr(layer, "lambda_1"):
        scales = (block.gamma_1, block.gamma_2) if hasattr(block, "gamma_1") else (block.ls1.gamma, block.ls2.gamma)
        layer.lambda_1.copy_(scales[0])
        layer.lambda_2.copy_(scales[1])
    if hasattr(layer, "relative_position_bias"):
        layer.relative_position_bias.relative_position_bias_table.copy_(block.attn.relative_position_bias_table)


def _set(module: Any, original: Any) -> None:
    module.weight.copy_(original.weight)
    if module.bias is not None:
        module.bias.copy_(original.bias)


def images(kind: str) -> Tensor:
    """Three images in double precision."""
    x = tiny_models.images() if kind == "vit" else torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return x.double()


def features(twin: Any, x: Tensor) -> Tensor:
    """What timm's forward_features gives: every token behind the last norm, [B, N, C]."""
    tower = twin.vit if hasattr(twin, "vit") else twin
    with torch.no_grad():
        hidden: Tensor = tower(pixel_values=x).last_hidden_state
        return tower.post_layernorm(hidden) if "CLIP" in type(tower).__name__ else hidden
