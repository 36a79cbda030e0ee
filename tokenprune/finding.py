"""Finding: the models in what a user hands over, the patches on them, and how these are taken off and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from tokenprune import registry
from tokenprune.errors import UnsupportedModel
from tokenprune.family import AppliedPatch, Family, active_patches, detach, replaced_by

# What a diffusion pipeline calls the models that denoise.
DENOISERS = ("unet", "transformer", "transformer_2")


def modules_of(target: object) -> list[nn.Module]:
    """`target` itself, or the denoisers of a pipeline."""
    if isinstance(target, torch.jit.ScriptModule):
        raise UnsupportedModel("a TorchScript module cannot be patched; patch the eager model and trace that")
    if isinstance(target, nn.Module):
        return [target]
    parts = [getattr(target, name, None) for name in DENOISERS]
    found = [part for part in parts if isinstance(part, nn.Module)]
    if not found:
        raise UnsupportedModel(
            f"expected a torch module, or a pipeline with a {' or '.join(DENOISERS[:2])}, got {type(target).__name__}"
        )
    return found


def patches_on(target: object) -> list[AppliedPatch]:
    """Every patch on `target` and inside it."""
    return [patch for module in modules_of(target) for patch in active_patches(module).values()]


def active_on(target: object) -> list[AppliedPatch]:
    """The same of a target that is patched.

    Raises:
        UnsupportedModel: it is not.
    """
    found = patches_on(target)
    if not found:
        raise UnsupportedModel("nothing here is patched; call tokenprune.patch(model, flops=0.6) first")
    return found


def find_models(target: object) -> list[tuple[nn.Module, Family]]:
    """The models in `target` that a family knows, each with it.

    Raises:
        UnsupportedModel: there is none.
    """
    return [_find_in(getattr(module, "_orig_mod", module)) for module in modules_of(target)]


def _find_in(module: nn.Module) -> tuple[nn.Module, Family]:
    for family in registry.families():
        model = family.find(module)
        if model is not None:
            return model, family
    raise UnsupportedModel(
        f"no adapter knows {type(module).__name__} or a module inside it; supported: timm vision transformers"
        " (VisionTransformer, DeiT, BEiT, EVA, hybrid, relative-position, CaiT, NaFlexViT) and its models of windows"
        " (SwinTransformer, SwinTransformerV2, VisionTransformerSAM, Hiera), transformers' image towers"
        " (CLIP, SigLIP, ViT, DeiT, BEiT, DINOv2, DINOv3, and those of InternVL, Idefics3, SmolVLM and Qwen-VL) and"
        " vision-language models (Llava, LlavaNext, LlavaOnevision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Gemma3,"
        " PaliGemma, Idefics3, SmolVLM) and diffusers'"
        " denoisers (UNet2DConditionModel, transformers); others through tokenprune.register_adapter"
    )


@contextmanager
def bare(model: nn.Module, family: Family) -> Iterator[None]:
    """A model of `family` without what is patched on it, which is put back behind the with block."""
    earlier = replaced_by(family, model)
    detach(model, earlier)
    try:
        yield
    finally:
        reattach(model, family, earlier)


def reattach(model: nn.Module, family: Family, patches: Mapping[str, AppliedPatch]) -> None:
    """Put patches of a model back."""
    for earlier in patches.values():
        family.attach(model, earlier)
