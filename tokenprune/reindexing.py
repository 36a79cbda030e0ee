"""What else is indexed by token, re-indexed for those that are left: rotary tables, attention biases, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.host import gather_bias, gather_rope
from tokenprune.masking import log_mask
from tokenprune.state import TokenState, flow

if TYPE_CHECKING:
    from tokenprune.site import Site


def reindexed(site: Site, kwargs: dict[str, Any], state: TokenState, dtype: torch.dtype) -> dict[str, Any]:
    """The block's arguments for the tokens that are left; notes the rotary table and the bias for the score."""
    now = flow()
    kwargs = dict(kwargs)
    if site.rope_argument is not None and kwargs.get(site.rope_argument) is not None:
        if state.origin is not None:
            kwargs[site.rope_argument] = gather_rope(kwargs[site.rope_argument], state.origin)
        now.rope = kwargs[site.rope_argument]
    for name in site.bias_arguments:
        if kwargs.get(name) is not None:
            if kwargs[name].ndim == 3:  # one for all images, without a batch dimension
                kwargs[name] = kwargs[name].unsqueeze(0)
            if state.origin is not None:
                kwargs[name] = gather_bias(kwargs[name], state.origin, site.patch.num_prefix_tokens)
            now.bias = kwargs[name]
    bias = _key_bias(site, state, dtype) if site.key_bias is not None else None
    if bias is not None and site.key_bias is not None:
        kwargs[site.key_bias] = now.bias = bias if now.bias is None else now.bias + bias
    return kwargs


def _key_bias(site: Site, state: TokenState, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits of every key, [B, 1, 1, P + n]: log(size) for proportional attention, and in a
    training forward the logarithm of its mask."""
    bias = state.sizes.log() if site.patch.method.proportional and state.sizes is not None else None
    if state.alive is not None:
        mask = F.pad(log_mask(state.alive), (site.patch.num_prefix_tokens, 0))
        bias = mask if bias is None else bias + mask
    return None if bias is None else bias.to(dtype)[:, None, None]


def own_bias(site: Site, bias: Tensor) -> Tensor:
    """The bias [1, H, N, N] that an attention computes for itself, for the tokens that are left."""
    now = flow()
    state = now.state
    if state is None:
        return bias
    if state.origin is not None:
        bias = gather_bias(bias, state.origin, site.patch.num_prefix_tokens)
    of_keys = _key_bias(site, state, bias.dtype) if site.key_bias is None else None
    if of_keys is not None:
        bias = bias + of_keys
    now.bias = bias if now.bias is None else now.bias + bias
    return bias
