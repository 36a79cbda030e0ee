"""What a part of a block asks while the block runs: the points where the adapters' classes call back.

Each finds the site of the block that runs now in its thread, and does nothing outside of a patched forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenprune.reindexing import own_bias
from tokenprune.site import Site
from tokenprune.state import flow, in_backward


def reduce_here(x: Tensor) -> Tensor:
    """The reduction point inside a block: reduces x [B, N, C] at the site whose block runs now in this thread."""
    site = flow().site
    return site.reduce(x) if site is not None and site.mid else x


def front_here(x: Tensor) -> Tensor:
    """The tokens of x [B, N, C] that the block that runs now in this thread has to put out: x itself, or those in front
    where no other is read behind it."""
    front = flow().front
    return x if front is None else x[:, :front]


def run_here(block: nn.Module, run: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    """run(x, ...) as the forward of `block`, also where gradient checkpointing runs that once more without the block's
    hooks (a checkpoint inside of `__call__`)."""
    site = _site_of(block) if in_backward() else None
    if site is None or not site.patch.active or flow().site is site:
        return run(x, **kwargs)
    site.resume(x, kwargs)
    try:
        return run(x, **kwargs)
    finally:
        flow().clear()


def _site_of(block: nn.Module) -> Site | None:
    owners = (getattr(hook, "__self__", None) for hook in block._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Site)), None)


def bias_here() -> Tensor | None:
    """The bias of the attention logits in the block that runs now in this thread, where its layer does not hand it
    on."""
    return flow().bias


def own_bias_here(bias: Tensor) -> Tensor:
    """The bias that an attention computed for itself, re-indexed for the block that runs now in this thread."""
    site = flow().site
    return bias if site is None else own_bias(site, bias)
