"""diffusers' denoising transformers: rows of blocks, which a method divides into stacks."""

from __future__ import annotations

import inspect

import diffusers
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

MODELS = {
    "DiTTransformer2DModel": 1000.0,
    "PixArtTransformer2DModel": 1000.0,
    "SD3Transformer2DModel": 1000.0,
    "FluxTransformer2DModel": 1.0,
    "WanTransformer3DModel": 1000.0,
    "LTXVideoTransformer3DModel": 1000.0,
    "CogVideoXTransformer3DModel": 1000.0,
    "CogView3PlusTransformer2DModel": 1000.0,
    "CogView4Transformer2DModel": 1000.0,
    "HunyuanVideoTransformer3DModel": 1000.0,
    "QwenImageTransformer2DModel": 1.0,
}
"""The timestep of pure noise as each model is given it: a step of 1000, or a noise level."""

_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


def describe(model: nn.Module) -> DenoiserHost:
    """The facts of a transformer.

    Raises:
        UnsupportedModel: it, or a block in it, is not known.
    """
    name = type(model).__name__
    rows, shared = [], False
    for attribute in _LISTS:
        blocks = []
        for i, block in enumerate(getattr(model, attribute, ())):
            facts, together = block_facts(f"{attribute}.{i}", block)
            blocks.append(facts)
            shared |= together
        if blocks:
            rows.append(Stack(attribute, tuple(blocks)))
    if name not in MODELS or not rows:
        raise UnsupportedModel(f"{name} is not known; known transformers: {', '.join(sorted(MODELS))}")
    return DenoiserHost(
        model=model,
        stacks=rows,
        arguments=tuple(inspect.signature(type(model).forward).parameters)[1:],
        latents="hidden_states",
        timestep="timestep",
        last_timestep=MODELS[name],
        shared=shared,
        convolves=False,
        remembers=cache_on,
        countable=count_natively,
        divisible=True,
    )


@register_adapter
class DiffusersTransformer:
    """See `tokenprune.family.Family`."""

    name = "diffusers_dit"

    describe = staticmethod(describe)

    def find(self, target: object) -> nn.Module | None:
        known = isinstance(target, diffusers.ModelMixin) and any(hasattr(target, name) for name in _LISTS)
        return target if known and isinstance(target, nn.Module) else None

    def prepare(self, model: nn.Module, method: Method, request: Request) -> DenoiserPatch:
        return prepare(describe, model, self.name, method, request)

    def attach(self, model: nn.Module, patch: DenoiserPatch) -> None:
        attach(describe(model), patch)
