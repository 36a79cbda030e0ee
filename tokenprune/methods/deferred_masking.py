"""Deferred masking (Sehwag et al., "Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget", CVPR
2025)."""

from __future__ import annotations

from functools import partial

from tokenprune.errors import UnsupportedMethod
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.drawn import Color, check_color, drawn
from tokenprune.selection.top_k import keep_top_k


@register_method("deferred_masking")
def deferred_masking(*, rate: float = 0.25, mixer: float = 0.25, color: Color = "white", sigma: float = 1.0) -> Method:
    """In training alone, drop patches at random behind the first blocks, of each image its own (section 2.2).

    The first blocks are the paper's patch mixer and see all patches; the others compute the kept ones, and the loss is
    meant over those: `masked_mse(prediction, target, kept_patches(model))`. In eval mode every token is there, and
    `unpatch` is the paper's unmasked tuning. A dropped patch leaves the last block with what the mixer made of it.

    rate: share kept. mixer: share of the blocks, rounded down, at least one; the paper's mixer is a network of its own
    in front of the blocks, and a model that is trained with this one stays what it is. color, sigma: see `noise_mask`.
    Where a model has one rotary table for all images, all lose the same patches. Which is drawn as in `flip`.
    """
    check_color(color, sigma)
    if isinstance(mixer, bool) or not isinstance(mixer, (int, float)) or not 0 < mixer < 1:
        raise UnsupportedMethod(f"mixer={mixer!r} is a share of the blocks, between 0 and 1; for example mixer=0.25")
    return Method(
        name="deferred_masking",
        paper="Sehwag et al., Stretching Each Dollar, 2024",
        schedule=Stages(rate),
        score=partial(drawn, color=color, sigma=sigma),
        select=keep_top_k,
        needs=frozenset({"mixer"}),
        stack_share=rate,
        recover="residual",
        mixer=mixer,
        training_only=True,
    )
