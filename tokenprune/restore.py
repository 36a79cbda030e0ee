"""Restoring the full grid: every original patch gets the value of the token that stands for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.kernels.matching import cosine_match
from tokenprune.reduction import Reduction, gather_tokens
from tokenprune.state import TokenState


def follow_source(state: TokenState, source: Tensor) -> Tensor:
    """Compose the stand-ins before a place with the place's own `source` [B, n]: [B, entering], -1 for none."""
    if state.source is None:
        return source
    return torch.where(state.source < 0, -1, source.gather(1, state.source.clamp(min=0)))


def stand_ins(state: TokenState, reduction: Reduction, body: Tensor, metric: Tensor, leaving: Tensor) -> TokenState:
    """`state` with the stand-in of every original patch, and what to add to its value.

    A merged patch is represented by its group. A dropped (or fused) one by the kept token with the most similar key
    (similarity-based recovery, AT-EDM section 3.3), plus the difference between the two when it was dropped: the
    dropped token keeps its own content and receives the updates of its stand-in.

    body: [B, n, C] values that enter the place; metric: [B, n, D]; leaving: [B, K, C] values that leave it.
    """
    count = body.shape[1]
    kept = Reduction(reduction.kept).source(count)
    gone = count - reduction.kept.shape[1]
    if reduction.moved is not None and not reduction.fuses:
        kept = reduction.source(count)
        gone -= reduction.moved.shape[1]
    offset = state.offset
    if gone > 0:
        lost = (kept < 0).to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :gone]
        near = cosine_match(gather_tokens(metric, lost), gather_tokens(metric, reduction.kept))[1]
        kept = kept.scatter(1, lost, near)
        step = torch.zeros_like(body).scatter(
            1,
            lost.unsqueeze(-1).expand(-1, -1, body.shape[-1]),
            gather_tokens(body, lost) - gather_tokens(leaving, near),
        )
        if state.stand_in is not None:
            step = gather_tokens(step, state.stand_in)
        offset = step if offset is None else offset + step
    stand_in = kept if state.stand_in is None else kept.gather(1, state.stand_in)
    return replace(state, stand_in=stand_in, offset=offset)


def restore_tokens(x: Tensor, state: TokenState, num_prefix_tokens: int) -> Tensor:
    """The full sequence [B, P + entering, C] behind the reduced one x [B, P + n, C]."""
    if state.stand_in is None:
        return x
    body = gather_tokens(x[:, num_prefix_tokens:], state.stand_in)
    if state.offset is not None:
        body = body + state.offset.to(body.dtype)
    return torch.cat([x[:, :num_prefix_tokens], body], 1)
