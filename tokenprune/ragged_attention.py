"""A host's own attention on a ragged batch: the packed tokens [1, T, C] of images of different lengths.

Where the attention calls scaled_dot_product_attention, it runs once and the packed kernel answers that call, so that
projections, norms, gates and rotary embedding stay the host's. An attention that works otherwise (a bias of its own, no
fused call) runs once for each length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenprune.attention_calls import ATTENTION, AttentionCall, AttentionCalls
from tokenprune.errors import UnsupportedModel
from tokenprune.kernels.packed_attention import packed_attention
from tokenprune.ragged import Group, Pack
from tokenprune.reindexing import reindexed
from tokenprune.state import TokenState, flow

if TYPE_CHECKING:
    from tokenprune.host import Caught
    from tokenprune.site import Site

Forward = Callable[..., Tensor]


class AnswerAttention(AttentionCalls):
    """While it is on, scaled_dot_product_attention over a packed sequence stays within each image.

    calls: how many it has answered.
    """

    def __init__(self, lengths: tuple[int, ...], starts: Tensor) -> None:
        super().__init__()
        self.lengths, self.starts = lengths, starts
        self.calls = 0

    def attend(self, call: AttentionCall) -> Tensor:
        """query, key, value: [1, H, T, D]; attn_mask: a bias of the keys [1, 1, 1, T] or None."""
        self.calls += 1
        query, key, value, mask, dropout, causal, scale, grouped = call
        packed = query.shape[0] == 1 and query.shape[2] == key.shape[2] == sum(self.lengths)
        of_keys = mask is None or mask.shape[:3] == (1, 1, 1)
        if not packed or not of_keys or causal or grouped:
            raise UnsupportedModel("this attention makes a call that the packed kernel cannot answer")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bias = mask.reshape(-1) if mask is not None else None
        out = packed_attention(q, k, v, self.starts, lengths=self.lengths, key_bias=bias, scale=scale, dropout=dropout)
        return out.transpose(0, 1)[None]


def attended(output: Any) -> Tensor:
    """The tokens that an attention puts out, alone or in front of its weights."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens


def attend_here(forward: Forward, x: Tensor, **kwargs: Any) -> Tensor:
    """An attention's own `forward` on x, within each image where x [1, T, C] is a ragged batch."""
    now = flow()
    site, state = now.site, now.state
    if site is None or state is None or state.pack is None:
        return forward(x, **kwargs)
    now.attended = True
    replaced = F.scaled_dot_product_attention is not ATTENTION  # by the user, with one that nothing can answer for
    out = _answered(site, state.pack, forward, x, **kwargs) if site.intercepts and not replaced else None
    return out if out is not None else _per_length(site, state, state.pack, forward, x, **kwargs)


def _answered(site: Site, pack: Pack, forward: Forward, x: Tensor, **kwargs: Any) -> Tensor | None:
    """One call for all images; None where that cannot be."""
    if any(kwargs.get(name) is not None for name in site.bias_arguments):
        return None
    if site.rope_argument is not None and kwargs.get(site.rope_argument) is not None:
        if site.rope_identity is None:
            return None
        table = kwargs[site.rope_argument]
        kwargs[site.rope_argument] = packed_rope(table, pack, site.rope_identity(table))
    if site.patch.method.proportional and pack.sizes is not None and site.key_bias is not None:
        kwargs[site.key_bias] = pack.sizes.log().to(x.dtype)[None, None, None]
    with AnswerAttention(pack.lengths, pack.starts) as answer:
        out = forward(x, **kwargs)
    return out if answer.calls else None


def _per_length(site: Site, state: TokenState, pack: Pack, forward: Forward, x: Tensor, **kwargs: Any) -> Tensor:
    """One call for the images of each length, each as if they were a batch of their own."""
    now = flow()
    outputs, captured = [], []
    inputs, values = now.inputs, now.values  # caught before the call
    for group in pack.groups:
        now.state = state_of(group, pack, state)
        now.queries = now.keys = now.bias = now.rope = None
        now.inputs, now.values = _part(group, inputs), _part(group, values)
        own = reindexed(site, of_images(site, kwargs, group.images), now.state, x.dtype)
        outputs.append(forward(group.of(x[0]), **own).flatten(0, 1))
        captured.append((site.taps.captured(), now.bias, now.rope) if site.reduces else None)
    now.state, now.groups = state, captured
    return torch.cat(outputs)[None] if outputs else x


def _part(group: Group, caught: Caught | None) -> Caught | None:
    return None if caught is None else (caught[0], group.of(caught[1][0]))


def each_image_here(draw: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x times what `draw` makes of a one for each image: a random factor [B, 1, 1], where x [1, T, C] is packed."""
    state = flow().state
    if state is None or state.pack is None:
        return draw(x)
    lengths = torch.tensor(state.pack.lengths, device=x.device)
    factors = draw(x.new_ones(len(state.pack.lengths), 1, 1))
    return x * factors[:, 0].repeat_interleave(lengths, 0)[None]


def packed_rope(table: Tensor, pack: Pack, identity: Tensor) -> Tensor:
    """Rotary rows of a packed sequence behind its first P tokens, `identity` [D] for the other images' prefix tokens.

    table: [N, D], [H, N, D] or [B, 1 or H, N, D] over the full grid. Returns [1, 1 or H, T - P, D].
    """
    origin = pack.origin[pack.num_prefix_tokens :]
    row = origin.clamp(min=0)
    if table.ndim == 4 and table.shape[0] > 1:
        lengths = torch.tensor(pack.lengths, device=origin.device)
        image = torch.tensor(pack.images, device=origin.device).repeat_interleave(lengths)
        rows = table[image[pack.num_prefix_tokens :], :, row].transpose(0, 1)
    else:
        rows = table.reshape(-1, *table.shape[-2:])[:, row]
    return torch.where((origin < 0)[:, None], identity, rows)[None]


def of_images(site: Site, kwargs: dict[str, Any], images: tuple[int, ...]) -> dict[str, Any]:
    """The block's arguments of those images, in that order, where they hold one entry for each image."""
    kwargs = dict(kwargs)
    for name in filter(None, (site.rope_argument, *site.bias_arguments)):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[0] > 1:
            kwargs[name] = value[list(images)]
    return kwargs


def state_of(group: Group, pack: Pack, state: TokenState) -> TokenState:
    """The state of a group's images, which have equally many tokens."""
    prefix = pack.num_prefix_tokens
    sizes = group.of(pack.sizes) if pack.sizes is not None else None
    origin = group.of(pack.origin)[:, prefix:]
    return replace(state, pack=None, tokens=group.length - prefix, origin=origin, sizes=sizes)
