"""The small diffusion models as diffusers pipelines: labels in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tokenprune.evals.digits_checkpoints import trained
from tokenprune.evals.digits_denoisers import UNCONDITIONAL, predict
from tokenprune.evals.drawn_digits import IMAGE_SIZE, to_pixels

STEPS = 20
GUIDANCE = 3.0


class DigitsPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws digits: ``pipe(labels)`` gives pictures [B, 3, 36, 36] in [0, 1]. `denoiser` is its model."""

    @property
    def denoiser(self) -> nn.Module:
        """The transformer or the U-Net."""
        components: dict[str, Any] = self.components
        model: nn.Module = components.get("transformer") or components["unet"]
        return model

    @torch.no_grad()
    def __call__(
        self,
        labels: Tensor,
        *,
        centres: Tensor | None = None,
        num_inference_steps: int = STEPS,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = GUIDANCE,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        original: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """labels: [B] in 0..9. centres: [B, 2], row and column in pixels where the U-Net is to draw the digit (the DiT
        takes no place), None for anywhere. guidance_scale: of classifier-free guidance; 1 is one forward a step.

        sigmas: shares of noise at which the steps begin, from 1 down; None for `num_inference_steps` even ones. The
        last step ends without noise.

        latents: noise [B, 3, 36, 36] to start from, drawn by `generator` where it is not given.

        original, mask: inpainting of images [B, 3, 36, 36] in the models' space, under a mask [36, 36] of ones; around
        it each step is given the original with the noise that belongs to it, and at last the original itself.
        """
        model = self.denoiser
        parameter = next(model.parameters())
        labels = labels.to(parameter.device)
        if latents is None:
            latents = torch.randn(len(labels), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        images = latents.to(parameter.device, parameter.dtype)
        noise = images
        if original is not None and mask is not None:
            original, mask = original.to(images), mask.to(images.device)
        # The scheduler's own spacing would spend the last of its steps on the last thousandth of the way.
        even = torch.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
        levels = np.array(even if sigmas is None else sigmas)  # UniPC takes no list
        self.scheduler.set_timesteps(len(levels), sigmas=levels, device=parameter.device)
        for timestep in self.scheduler.timesteps:
            if guidance_scale == 1.0:
                velocity = predict(model, images, timestep.expand(len(images)), labels, centres)
            else:
                both = torch.cat([torch.full_like(labels, UNCONDITIONAL), labels])
                twice, places = images.repeat(2, 1, 1, 1), None if centres is None else centres.repeat(2, 1)
                free, bound = predict(model, twice, timestep.expand(len(both)), both, places).chunk(2)
                velocity = free + guidance_scale * (bound - free)
            images = self.scheduler.step(velocity, timestep, images, return_dict=False)[0]
            if original is not None and mask is not None:
                sigma = self.scheduler.sigmas[self.scheduler.step_index]
                around = original if sigma == 0 else (1 - sigma) * original + sigma * noise
                images = torch.where(mask > 0, images, around)
        return to_pixels(images)


class DiTDigitsPipeline(DigitsPipeline):
    """`DigitsPipeline` around a `DiTTransformer2DModel`."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


class UNetDigitsPipeline(DigitsPipeline):
    """`DigitsPipeline` around a `UNet2DConditionModel`."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def digits_pipeline(name: str, folders: Sequence[str | Path] = ()) -> DigitsPipeline:
    """The pipeline of the model called `name` (`dit-digits` or `unet-digits`), fp32; folders: as in `trained`."""
    return pipeline_of(trained(name, folders))


def pipeline_of(denoiser: nn.Module, scheduler: Any = None) -> DigitsPipeline:
    """A pipeline around `denoiser`, with a scheduler of its own: Euler's, or the one that is given."""
    kind = DiTDigitsPipeline if hasattr(denoiser, "transformer_blocks") else UNetDigitsPipeline
    return kind(denoiser, FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler)
