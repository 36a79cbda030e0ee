"""Masking: tokens that leave in name only, so that what decides on them can be learned.

In a training forward all tokens stay in their places. Those that would have left are no keys of any attention behind
that place, so that nothing else sees them; and as a mask is a number with a gradient, the loss says how much it would
change if they were seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.merge import gather
from tokenprune.ragged import RaggedReduction
from tokenprune.state import TokenState, flow, in_backward

if TYPE_CHECKING:
    from tokenprune.site import Site

FLOOR = 1e-9
"""What a masked key still counts for: its logarithm is finite, and so is the gradient of a mask of zero."""


@dataclass(frozen=True)
class Masking:
    """What becomes of n tokens at a place, some of which may be none any more (`AttentionRecord.alive`).

    alive: [B, n] one for a token that goes on and zero for one that does not, with the gradient of what decided it; it
    is multiplied with those before it, so that of what is none any more it decides no more than gradients. target:
    [B, n] position of the token that each is merged into, which then goes on or not for both of them, and its own where
    it is not merged.
    """

    alive: Tensor
    target: Tensor

    def rows(self) -> Tensor:
        """`target` as that of a RaggedReduction, -1 where nothing goes on: [B, n]."""
        return torch.where(gather(self.alive, self.target) > 0, self.target, -1)


def masked_away(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, mask: Callable[[AttentionRecord, int], Masking]
) -> RaggedReduction:
    """The selection of a method that decides by `mask`."""
    return RaggedReduction(mask(record, keep).rows())


def straight_through(values: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """One where `values` are above the threshold, else zero; its gradient is that of
    sigmoid((values - threshold) / temperature)."""
    soft = ((values - threshold) / temperature).sigmoid()
    return (values > threshold).to(soft.dtype) + (soft - soft.detach())


def log_mask(alive: Tensor) -> Tensor:
    """What to add to the logits of a key: 0 for a mask of one, the logarithm of FLOOR for zero."""
    return (alive + FLOOR * (1 - alive)).log()


def mask_tokens(site: Site, x: Tensor, state: TokenState) -> Tensor:
    """Decide on the tokens of x [B, P + n, C] at a place of a training forward; merged ones are averaged into the token
    that stands for them, and all stay."""
    patch = site.patch
    assert patch.lesson is not None
    assert patch.method.mask is not None
    record = site.taps.record(x, state)
    masking = patch.method.mask(record, record.tokens)
    alive = masking.alive if state.alive is None else state.alive * masking.alive
    if not in_backward():  # where gradient checkpointing runs the block once more
        patch.lesson.alive[site.index] = alive
    prefix, target = patch.num_prefix_tokens, masking.target
    sizes = state.sizes if state.sizes is not None else x.new_ones(x.shape[:2], dtype=torch.float32)
    if patch.method.merges:
        own = torch.arange(target.shape[1], device=x.device)
        body, merged = _averaged(x[:, prefix:], sizes[:, prefix:], target, target != own)
        x, sizes = torch.cat([x[:, :prefix], body], 1), torch.cat([sizes[:, :prefix], merged], 1)
    source = target if state.source is None else gather(target, state.source)
    flow().state = replace(state, alive=alive, sizes=sizes if patch.method.merges else None, source=source)
    return x


def _averaged(x: Tensor, sizes: Tensor, target: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, n, C] and sizes [B, n] with the `moved` tokens added, by size, to their `target` [B, n] too."""
    added = sizes * moved
    gained = torch.zeros_like(sizes).scatter_add(1, target, added)
    total = (sizes + gained).unsqueeze(-1)
    weighted = x * added.unsqueeze(-1)
    summed = torch.zeros_like(weighted).scatter_add(1, target.unsqueeze(-1).expand_as(weighted), weighted)
    averages = ((x * sizes.unsqueeze(-1) + summed) / total).to(x.dtype)
    return torch.where((gained > 0).unsqueeze(-1), averages, x), sizes + gained


def stand_ins(x: Tensor, state: TokenState, num_prefix_tokens: int) -> Tensor:
    """x [B, P + n, C] of a training forward with the value of each merged token's stand-in in its place."""
    if state.source is None:
        return x
    prefix = num_prefix_tokens
    return torch.cat([x[:, :prefix], gather(x[:, prefix:], state.source)], 1)
