"""What else is indexed by token, re-indexed for those that are left: rotary tables, attention biases, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.host import gather_bias, gather_rope
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
    if site.patch.method.proportional and state.sizes is not None and site.key_bias is not None:
        bias = _size_bias(state.sizes, dtype)
        kwargs[site.key_bias] = now.bias = bias if now.bias is None else now.bias + bias
    return kwargs


def _size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Proportional attention: log(size) of every key, [B, 1, 1, P + n]."""
    return sizes.log().to(dtype)[:, None, None]


def own_bias(site: Site, bias: Tensor) -> Tensor:
    """The bias [1, H, N, N] that an attention computes for itself, for the tokens that are left."""
    now = flow()
    state = now.state
    if state is None:
        return bias
    if state.origin is not None:
        bias = gather_bias(bias, state.origin, site.patch.num_prefix_tokens)
    if site.patch.method.proportional and state.sizes is not None and site.key_bias is None:
        bias = bias + _size_bias(state.sizes, bias.dtype)
    now.bias = bias if now.bias is None else now.bias + bias
    return bias
