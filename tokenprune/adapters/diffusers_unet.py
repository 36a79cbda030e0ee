"""diffusers' UNet2DConditionModel (Stable Diffusion 1 and 2, SDXL): each Transformer2DModel in it is a stack."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from tokenprune.adapters.diffusers_backends import count_natively
from tokenprune.adapters.diffusers_blocks import block_facts
from tokenprune.adapters.diffusers_caches import cache_on
from tokenprune.denoisers.host import DenoiserHost, Stack
from tokenprune.denoisers.patch import DenoiserPatch, attach
from tokenprune.denoisers.prepare import prepare
from tokenprune.errors import UnsupportedModel
from tokenprune.family import Request
from tokenprune.method import Method
from tokenprune.registry import register_adapter


def describe(model: nn.Module) -> DenoiserHost:
    """The facts of a U-Net.

    Raises:
        UnsupportedModel: a block in it is not known, or there is no attention in it.
    """
    unet: Any = model
    stacks = []
    for name, part in unet.named_modules():
        if isinstance(part, Transformer2DModel):
            blocks = [block_facts(f"{name}.{i}", block)[0] for i, block in enumerate(part.transformer_blocks)]
            stacks.append(Stack(name, tuple(blocks), _at_edge(unet, name)))
    if not stacks:
        raise UnsupportedModel(f"this {type(model).__name__} has no transformer blocks at any level, nothing to reduce")
    order = {part: i for i, part in enumerate(("down_blocks", "mid_block", "up_blocks"))}
    stacks.sort(key=lambda stack: order[stack.name.split(".")[0]])
    return DenoiserHost(
        model=model,
        stacks=stacks,
        arguments=tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:],
        latents="sample",
        timestep="timestep",
        last_timestep=1000.0,
        shared=False,
        convolves=True,
        remembers=cache_on,
        countable=count_natively,
        channels=unet.config.out_channels,
    )


def _at_edge(unet: Any, name: str) -> bool:
    """Whether a stack is the first of a stage on the way down or the last of one on the way up."""
    part, stage, *_ = [*name.split("."), ""]
    index = name.rsplit(".", 1)[-1]
    if part == "down_blocks":
        return index == "0"
    return part == "up_blocks" and int(index) == len(unet.up_blocks[int(stage)].attentions) - 1


@register_adapter
class DiffusersUNet:
    """See `tokenprune.family.Family`."""

    name = "diffusers_unet"

    describe = staticmethod(describe)

    def find(self, target: object) -> nn.Module | None:
        return target if isinstance(target, UNet2DConditionModel) else None

    def prepare(self, model: nn.Module, method: Method, request: Request) -> DenoiserPatch:
        return prepare(describe, model, self.name, method, request)

    def attach(self, model: nn.Module, patch: DenoiserPatch) -> None:
        attach(describe(model), patch)
