"""Restoring the full grid: every original patch gets the value of the token that stands for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction
from tokenprune.state import TokenState

PLACE_WEIGHT = 0.5
"""Weight of a token's place beside its hidden state: on a DINOv2's photographs 0.4 to 0.7 restored best."""


def follow_source(state: TokenState, source: Tensor) -> Tensor:
    """Compose the stand-ins before a place with the place's own `source` [B, n]: [B, entering], -1 for none."""
    if state.source is None:
        return source
    return torch.where(state.source < 0, -1, gather(source, state.source.clamp(min=0)))


def stand_ins(state: TokenState, reduction: Reduction, x: Tensor) -> Tensor:
    """The leaving position whose value restores each original patch, [B, entering].

    A merged patch is represented by its group. A dropped (or fused) one by the most similar kept token
    (similarity-based recovery, AT-EDM section 3.3), where similar means hidden states and, at less weight, places in
    the image. x: [B, n, C] of the tokens that enter the place.
    """
    count = x.shape[1]
    if reduction.moved is not None and not reduction.fuses:
        near = reduction.source(count)
    else:
        near = Reduction(reduction.kept).source(count)
        gone = count - reduction.kept.shape[1]
        lost = (near < 0).to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :gone]
        metric = placed(x, state)
        match = cosine_match(gather(metric, lost), gather(metric, reduction.kept))[1]
        near = Reduction(reduction.kept, lost, match).source(count)
    return near if state.stand_in is None else gather(near, state.stand_in)


def placed(x: Tensor, state: TokenState) -> Tensor:
    """What similarity is measured on: directions of x [B, n, C] with the direction of each token's place appended,
    [B, n, C + 4]."""
    if state.grid is None:
        return x
    rows, columns = state.grid
    origin = state.origins(x)
    angles = math.pi * torch.stack([(origin // columns) / rows, (origin % columns) / columns], -1)
    place = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
    return torch.cat([functional.normalize(x, dim=-1), place * (PLACE_WEIGHT / math.sqrt(2))], -1)


def restore_tokens(x: Tensor, state: TokenState, num_prefix_tokens: int) -> Tensor:
    """The full sequence [B, P + entering, C] behind the reduced one x [B, P + n, C]."""
    if state.stand_in is None:
        return x
    body = gather(x[:, num_prefix_tokens:], state.stand_in)
    return torch.cat([x[:, :num_prefix_tokens], body], 1)
