"""Tiny random denoisers, one of each class that is supported, with inputs of two sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

Inputs = Callable[[int, int, int], dict[str, Any]]


def _louder(model: nn.Module) -> nn.Module:
    """Weights scaled up and zero-initialised parts filled, so that an error in any token shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.5 * parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else torch.tensor(0.3)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale * noise + (1.0 if bool((parameter == 1).all()) else 0.0))
    return model.eval()


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _latents(b: int, h: int, w: int, channels: int = 4) -> torch.Tensor:
    return _seeded(b, channels, h, w)


def unet_sd() -> tuple[nn.Module, Inputs]:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return model, lambda b, h, w: {
        "sample": _latents(b, 4 * h, 4 * w),  # one block a stack pays only where attention is most of it
        "timestep": torch.tensor(5),
        "encoder_hidden_states": _seeded(b, 5, 8),
    }


def unet_sdxl() -> tuple[nn.Module, Inputs]:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 4, 6),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    return model, lambda b, h, w: {
        "sample": _latents(b, h, w),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "added_cond_kwargs": {"text_embeds": _seeded(b, 8), "time_ids": torch.ones(b, 6)},
    }


def dit() -> tuple[nn.Module, Inputs]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=4, sample_size=16,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _latents(b, max(h, w), max(h, w)),  # square only
        "timestep": torch.full((b,), 5),
        "class_labels": torch.arange(b),
    }


def pixart() -> tuple[nn.Module, Inputs]:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=4, sample_size=16,
        patch_size=2, cross_attention_dim=8, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _latents(b, h, w),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "timestep": torch.full((b,), 5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3(dual: tuple[int, ...] = ()) -> tuple[nn.Module, Inputs]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=dual, qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _latents(b, h, w),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "pooled_projections": _seeded(b, 8),
        "timestep": torch.full((b,), 5),
    }


def sd35() -> tuple[nn.Module, Inputs]:
    return sd3((0, 1))


def flux() -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip

    def inputs(b: int, h: int, w: int) -> dict[str, Any]:
        ids = torch.zeros(h // 2, w // 2, 3)
        ids[..., 1], ids[..., 2] = torch.arange(h // 2)[:, None], torch.arange(w // 2)[None]
        return {
            "hidden_states": _seeded(b, h * w // 4, 4),
            "encoder_hidden_states": _seeded(b, 5, 8),
            "pooled_projections": _seeded(b, 8),
            "timestep": torch.full((b,), 0.5),
            "img_ids": ids.reshape(-1, 3),
            "txt_ids": torch.zeros(5, 3),
        }

    return model, inputs


def wan() -> tuple[nn.Module, Inputs]:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=4, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _seeded(b, 4, 2, h, w),
        "timestep": torch.full((b,), 5),
        "encoder_hidden_states": _seeded(b, 5, 8),
    }


def ltx() -> tuple[nn.Module, Inputs]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=4, caption_channels=8,
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _seeded(b, 2 * h * w // 4, 4),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "timestep": torch.full((b,), 5),
        "encoder_attention_mask": torch.ones(b, 5).bool(),
        "num_frames": 2,
        "height": h // 2,
        "width": w // 2,
    }


def cogvideox() -> tuple[nn.Module, Inputs]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=4, sample_width=16, sample_height=16, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=5, use_rotary_positional_embeddings=True,
    )  # fmt: skip

    def inputs(b: int, h: int, w: int) -> dict[str, Any]:
        tokens = 2 * h * w // 4
        return {
            "hidden_states": _seeded(b, 2, 4, h, w),
            "encoder_hidden_states": _seeded(b, 5, 8),
            "timestep": torch.full((b,), 5),
            "image_rotary_emb": (_seeded(tokens, 16), _seeded(tokens, 16)),
        }

    return model, inputs


def cogview4() -> tuple[nn.Module, Inputs]:
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, rope_axes_dim=(4, 4),
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _latents(b, h, w),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "timestep": torch.full((b,), 5),
        "original_size": torch.tensor([[16, 16]]).expand(b, -1),
        "target_size": torch.tensor([[16, 16]]).expand(b, -1),
        "crop_coords": torch.tensor([[0, 0]]).expand(b, -1),
    }


def cogview3plus() -> tuple[nn.Module, Inputs]:
    model = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16,
    )  # fmt: skip
    return model, cogview4()[1]


def hunyuan_video() -> tuple[nn.Module, Inputs]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _seeded(b, 4, 2, h, w),
        "timestep": torch.full((b,), 5),
        "encoder_hidden_states": _seeded(b, 5, 8),
        "encoder_attention_mask": torch.ones(b, 5).long(),
        "pooled_projections": _seeded(b, 8),
        "guidance": torch.full((b,), 1000.0),
    }


def qwenimage() -> tuple[nn.Module, Inputs]:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, lambda b, h, w: {
        "hidden_states": _seeded(b, h * w // 4, 16),
        "encoder_hidden_states": _seeded(b, 5, 16),
        "encoder_hidden_states_mask": torch.ones(b, 5).long(),
        "timestep": torch.full((b,), 0.5),
        "img_shapes": [[(1, h // 2, w // 2)]] * b,
    }


ZOO: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    make.__name__: make
    for make in (
        unet_sd,
        unet_sdxl,
        dit,
        pixart,
        sd3,
        sd35,
        flux,
        wan,
        ltx,
        cogvideox,
        cogview3plus,
        cogview4,
        hunyuan_video,
        qwenimage,
    )
}


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model of that name in eval mode, and (batch, height, width of the latents) -> its keyword arguments."""
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    return _louder(model), inputs


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The prediction."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def gradients(model: nn.Module, calls: list[dict[str, Any]]) -> list[torch.Tensor | None]:
    """Of the latents of each call and of all parameters, after one backward through all calls."""
    key = "sample" if "sample" in calls[0] else "hidden_states"
    torch.manual_seed(0)  # a DiT in training drops labels
    latents = [x[key].clone().requires_grad_() for x in calls]
    losses = [
        model(**{**x, key: one}, return_dict=False)[0].square().mean() for x, one in zip(calls, latents, strict=True)
    ]
    sum(losses).backward()
    found = [one.grad for one in latents] + [weight.grad for weight in model.parameters()]
    model.zero_grad(set_to_none=True)
    return found


def traces(model: nn.Module) -> list[tuple[type, list[str], int, int]]:
    """What a patch could leave on a model."""
    return [
        (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def nothing_is_left(model: nn.Module) -> bool:
    """Whether no class and no hook of a patch is on a model that has no other hooks, whatever else was done to it."""
    modules = list(model.modules())
    hooks = [hook for module in modules for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    return not hooks and not any(hasattr(type(module), "_tokenprune_original") for module in modules)
