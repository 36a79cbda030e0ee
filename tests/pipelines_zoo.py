"""Tiny random pipelines around the denoisers of the zoo, without text encoders: prompts are embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload
from denoisers_zoo import build
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

Sample = Callable[..., Tensor]
"""(seed, further arguments) -> the latents that the pipeline puts out after a few steps."""


def _vae(**config: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0, scaling_factor=1.0, **config
    ).eval()


def _seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def offload_in_sequence(pipe: Any) -> None:
    """What enable_sequential_cpu_offload does: it names a device by number, and there is no CPU with one."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)


def _sampler(pipe: Any, **usual: Any) -> Sample:
    pipe.set_progress_bar_config(disable=True)

    def sample(seed: int = 0, **arguments: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.as_tensor(pipe(**{**usual, **arguments}, generator=generator).images)

    return sample


_SIZE = {"height": 32, "width": 24, "num_inference_steps": 3, "output_type": "latent"}
_WORDS, _NO_WORDS = _seeded(1, 5, 8), -_seeded(1, 5, 8)
_PROMPT = {"prompt_embeds": _WORDS, "negative_prompt_embeds": _NO_WORDS}


def _sd(cls: Any, unet: Any = None, *more: Any) -> Any:
    unet = build("unet_sd")[0] if unet is None else unet
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return cls(_vae(), None, None, unet, *more, scheduler, None, None, requires_safety_checker=False)


def text_to_image() -> tuple[Any, Sample]:
    pipe = _sd(diffusers.StableDiffusionPipeline)
    return pipe, _sampler(pipe, **_SIZE, **_PROMPT)


def image_to_image() -> tuple[Any, Sample]:
    pipe = _sd(diffusers.StableDiffusionImg2ImgPipeline)
    usual = {"image": torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(3)), "strength": 0.7}
    return pipe, _sampler(pipe, **usual, num_inference_steps=5, output_type="latent", **_PROMPT)


def inpainting() -> tuple[Any, Sample]:
    pipe = _sd(diffusers.StableDiffusionInpaintPipeline)
    mask = torch.zeros(1, 1, 32, 24)
    mask[..., 8:20, 4:16] = 1
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(3))
    return pipe, _sampler(pipe, image=image, mask_image=mask, **_SIZE, **_PROMPT)


def controlled() -> tuple[Any, Sample]:
    unet = build("unet_sd")[0]
    control: Any = diffusers.ControlNetModel.from_unet(unet)
    control.controlnet_cond_embedding = ControlNetConditioningEmbedding(
        8, 3, (4,)
    )  # the latents are of the image's size
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # its outputs are zero at the beginning
        for weight in control.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    pipe = _sd(diffusers.StableDiffusionControlNetPipeline, unet, control.eval())
    image = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(3))
    return pipe, _sampler(pipe, image=image, **_SIZE, **_PROMPT)


def sdxl() -> tuple[Any, Sample]:
    pipe = diffusers.StableDiffusionXLPipeline(
        _vae(), None, None, None, None, build("unet_sdxl")[0], diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip
    pooled = {"pooled_prompt_embeds": _seeded(1, 8), "negative_pooled_prompt_embeds": -_seeded(1, 8)}
    return pipe, _sampler(pipe, **_SIZE, **_PROMPT, **pooled)


def dit() -> tuple[Any, Sample]:
    pipe = diffusers.DiTPipeline(build("dit")[0], _vae(), diffusers.DDIMScheduler())
    return pipe, _sampler(pipe, class_labels=[3], num_inference_steps=3, output_type="np")


def pixart() -> tuple[Any, Sample]:
    pipe = diffusers.PixArtSigmaPipeline(None, None, _vae(), build("pixart")[0], diffusers.DDIMScheduler())
    words = torch.ones(1, 5).long()
    masks = {"prompt_attention_mask": words, "negative_prompt_attention_mask": words, "negative_prompt": None}
    return pipe, _sampler(pipe, use_resolution_binning=False, **_SIZE, **_PROMPT, **masks)


def sd3() -> tuple[Any, Sample]:
    pipe = diffusers.StableDiffusion3Pipeline(
        build("sd3")[0], diffusers.FlowMatchEulerDiscreteScheduler(), _vae(), *[None] * 6
    )
    pooled = {"pooled_prompt_embeds": _seeded(1, 8), "negative_pooled_prompt_embeds": -_seeded(1, 8)}
    return pipe, _sampler(pipe, **{**_SIZE, "height": 16, "width": 16}, **_PROMPT, **pooled)


def flux() -> tuple[Any, Sample]:
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), _vae(latent_channels=1), None, None, None, None, build("flux")[0]
    )
    pooled = {"pooled_prompt_embeds": _seeded(1, 8), "negative_pooled_prompt_embeds": -_seeded(1, 8)}
    return pipe, _sampler(pipe, **_SIZE, **_PROMPT, **pooled, true_cfg_scale=3.0)


PIPELINES: dict[str, Callable[[], tuple[Any, Sample]]] = {
    make.__name__: make
    for make in (text_to_image, image_to_image, inpainting, controlled, sdxl, dit, pixart, sd3, flux)
}
