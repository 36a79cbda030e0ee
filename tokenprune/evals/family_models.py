"""One tiny model with random weights for each family of models, and a forward of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SIDE = 32
"""Sides of the images of all but models of windows."""


# The model in eval mode, what is patched (the model or a part of it), and a forward of the model.
Made = tuple[nn.Module, nn.Module, Callable[[], Tensor]]


class Family(NamedTuple):
    """part: how the name of the first place begins where methods must work at one part of the model."""

    name: str
    make: Callable[[], Made]
    part: str = ""


def _images(model: nn.Module, side: int) -> Made:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return model, model, partial(_run, model, x)


def _run(model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output = model(*args, **inputs)
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def _timm(name: str, sizes: dict[str, Any] | None = None, side: int = SIDE) -> Made:
    import timm

    plain = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, img_size=(side, side), **(sizes or plain))
    return _images(model.eval(), side)


def _naflex() -> Made:
    sizes = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "pos_embed_grid_size": (8, 8)}
    return _timm("naflexvit_base_patch16_gap", sizes)


def _swin(name: str) -> Made:
    windows = {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2)}
    return _timm(name, windows)


def _sam() -> Made:
    windows = {"window_size": 4, "global_attn_indexes": (3,), "neck_chans": 8}
    sizes = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 4}
    return _timm("samvit_base_patch16", {**sizes, **windows})


def _hiera() -> Made:
    return _timm("hiera_tiny_224", {"embed_dim": 8, "stages": (1, 2, 3, 2)}, side=128)


def _transformers(name: str, **more: Any) -> Made:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(image_size=SIDE, patch_size=4, **sizes, **more)
    cls = getattr(transformers, f"{name}Model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls(config)
    return _images(model.eval(), SIDE)


def _llava(part: str) -> Made:
    from tokenprune.evals.digits_lvlm import lvlm, prompts, what_is_there
    from tokenprune.evals.placed_digits import IMAGE_SIZE

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = lvlm(text={**sizes, "num_hidden_layers": 8}, tower={**sizes, "num_hidden_layers": 5})
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    ids = prompts(what_is_there(1))
    run = partial(_run, model, input_ids=ids, pixel_values=pixels)
    return model, model.model.vision_tower if part == "tower" else model, run


def _unet() -> Made:
    from tokenprune.evals.digits_denoisers import UNCONDITIONAL, prompts, unet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = unet(block_out_channels=(8, 96))
    text = prompts(torch.tensor([UNCONDITIONAL]))
    return model, model, partial(_run, model, _latents(3, 36), torch.tensor(500), encoder_hidden_states=text)


def _dit() -> Made:
    from tokenprune.evals.digits_denoisers import dit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = dit()
    inputs = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([3])}
    return model, model, partial(_run, model, _latents(3, 36), **inputs)


def _flux() -> Made:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            **{"patch_size": 1, "in_channels": 4, "num_layers": 4, "num_single_layers": 4, "joint_attention_dim": 32},
            **{"attention_head_dim": 16, "num_attention_heads": 2, "pooled_projection_dim": 8},
            axes_dims_rope=(4, 6, 6),
        )
    rows = torch.arange(16)
    places = torch.stack([torch.zeros(16, 16), *torch.meshgrid(rows, rows, indexing="ij")], -1).flatten(0, 1)
    inputs = {
        "hidden_states": _latents(4, 16).flatten(2).transpose(1, 2),
        "encoder_hidden_states": torch.zeros(1, 5, 32),
        "pooled_projections": torch.zeros(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }
    return model.eval(), model, partial(_run, model, **inputs)


def _latents(channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))


IMAGE_FAMILIES = (
    Family("timm ViT", partial(_timm, "vit_tiny_patch16_224")),
    Family("DeiT", partial(_timm, "deit_tiny_distilled_patch16_224")),
    Family("EVA (rotary)", partial(_timm, "eva02_tiny_patch14_224")),
    Family("registers", partial(_timm, "vit_small_patch14_reg4_dinov2")),
    Family("BEiT", partial(_timm, "beit_base_patch16_224")),
    Family("relative position", partial(_timm, "vit_relpos_small_patch16_224")),
    Family("NaFlexViT", _naflex),
    Family("CaiT", partial(_timm, "cait_xxs24_224")),
    Family("Swin", partial(_swin, "swin_tiny_patch4_window7_224")),
    Family("Swin v2", partial(_swin, "swinv2_tiny_window8_256")),
    Family("Hiera", _hiera),
    Family("SAM", _sam),
    Family("CLIP", partial(_transformers, "CLIPVision")),
    Family("SigLIP", partial(_transformers, "SiglipVision")),
    Family("ViT", partial(_transformers, "ViT")),
    Family("DINOv2", partial(_transformers, "Dinov2")),
    Family("DINOv3", partial(_transformers, "DINOv3ViT", num_register_tokens=4)),
)
OTHER_FAMILIES = (
    Family("LLaVA: its tower", partial(_llava, "tower")),
    Family("LLaVA: behind the tower", partial(_llava, "model"), "after the tower"),
    Family("LLaVA: inside the language model", partial(_llava, "model"), "layers"),
    Family("U-Net", _unet),
    Family("DiT", _dit),
    Family("Flux", _flux),
)
