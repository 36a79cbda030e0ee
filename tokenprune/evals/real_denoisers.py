"""Denoisers of published pipelines at their real sizes, with random weights and inputs of one forward.

Each function gives (model, inputs) on torch's default device and in its default dtype (`created_on`). The batch is one
picture's latents as often as guidance takes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
STEPS = 4096  # more than a measurement takes
NOISE = (0.6, 0.4)  # shares of it between which the timesteps fall


@contextmanager
def created_on(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Models and tensors that are made inside are made on `device`, floating-point ones in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def sd15(pixels: int = 512, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """The U-Net of Stable Diffusion 1.5."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=pixels // 8, cross_attention_dim=768)
    return model, {"sample": _latents(batch, 4, pixels // 8), "encoder_hidden_states": torch.randn(batch, 77, 768)}


def sdxl(pixels: int = 1024, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """The U-Net of Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        cross_attention_dim=2048,
    )
    added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.full((batch, 6), float(pixels))}
    return model, {
        "sample": _latents(batch, 4, pixels // 8),
        "encoder_hidden_states": torch.randn(batch, 77, 2048),
        "added_cond_kwargs": added,
    }


def pixart(pixels: int = 1024, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """PixArt-alpha XL/2."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(sample_size=pixels // 8, caption_channels=4096)
    size = {"resolution": torch.full((batch, 2), float(pixels)), "aspect_ratio": torch.ones(batch, 1)}
    return model, {
        "hidden_states": _latents(batch, 4, pixels // 8),
        "encoder_hidden_states": torch.randn(batch, 120, 4096),
        "encoder_attention_mask": torch.ones(batch, 120),
        "added_cond_kwargs": size,
    }


def sd3(pixels: int = 1024, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """The transformer of Stable Diffusion 3 medium."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
    )
    return model, {
        "hidden_states": _latents(batch, 16, pixels // 8),
        "encoder_hidden_states": torch.randn(batch, 333, 4096),
        "pooled_projections": torch.randn(batch, 2048),
    }


def flux(pixels: int = 1024, batch: int = 1) -> tuple[nn.Module, Inputs]:
    """The transformer of FLUX.1-dev."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(guidance_embeds=True)
    side = pixels // 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return model, {
        "hidden_states": torch.randn(1, side**2, 64).repeat(batch, 1, 1),
        "encoder_hidden_states": torch.randn(batch, 512, 4096),
        "pooled_projections": torch.randn(batch, 768),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": places.to(torch.get_default_dtype()),
        "txt_ids": torch.zeros(512, 3),
    }


def _latents(batch: int, channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side).repeat(batch, 1, 1, 1)


def latents_of(inputs: Mapping[str, Any]) -> str:
    """The name of the latents among the inputs."""
    return "sample" if "sample" in inputs else "hidden_states"


def later_steps(model: nn.Module, inputs: Mapping[str, Any], noisiest: float = 1000.0) -> Callable[[], object]:
    """A call is one forward, its timestep a little below the last one's: a step of a run, its first one apart. The same
    latents at the same timestep would be a guided step's other call, for which no tokens are chosen anew.

    noisiest: the timestep of pure noise.
    """
    latents = inputs[latents_of(inputs)]
    first, last = (share * noisiest for share in NOISE)
    steps = torch.linspace(first, last, STEPS, dtype=torch.float32, device=latents.device)
    turns = itertools.cycle(steps[:, None].expand(-1, len(latents)).unbind())
    others = {name: given for name, given in inputs.items() if given is not latents}
    return lambda: model(latents, timestep=next(turns), **others)  # the first, as pipelines give them


def first_steps(model: nn.Module, inputs: Mapping[str, Any], noisiest: float = 1000.0) -> Callable[[], object]:
    """A call is the first step of a run: other latents at the same timestep."""
    name = latents_of(inputs)
    latents = inputs[name]
    step = torch.full((len(latents),), NOISE[0] * noisiest, dtype=torch.float32, device=latents.device)
    turns = itertools.cycle([partial(model, **{**inputs, name: x}, timestep=step) for x in (latents, latents.clone())])
    return lambda: next(turns)()
