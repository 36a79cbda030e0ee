"""Restoring the full grid: a merged patch gets its group's value, a dropped one an estimate from the kept tokens.

The estimate is a Gaussian-process regression (Rasmussen & Williams, "Gaussian Processes for Machine Learning", equation
2.25): from the place at which it was dropped, a token's similarity to the kept ones is known, and from the depth at
which the grid is restored, their values. Copying the most similar token (similarity-based recovery, AT-EDM section 3.3)
loses what lies between the kept tokens; a dropped token's own hidden state plus what changed since is no better than
the regression without it, and would have to be stored and differentiated through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.attention_match import attention_match
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction
from tokenprune.state import TokenState
from tokenprune.tables import table

PLACE_WEIGHT = 0.5
"""Weight of a token's place beside its hidden state: on a DINOv2's photographs 0.4 to 0.7 restored best."""

SHARPNESS = 1.25
NOISE = 0.01
"""Kernel exp(SHARPNESS * (cosine - 1)) and the variance beside it. On a DINOv2's photographs SHARPNESS from 0.4 and
NOISE from 0.003 to 0.03 restored as well; a SHARPNESS of 4, whose estimates soon fall back to the mean, worse."""

MOST = 512
"""Most kept tokens that a regression takes, evenly chosen of more: at thousands of tokens, the squares and cubes of
their number would cost much of what dropping tokens saves."""


def follow_source(state: TokenState, source: Tensor) -> Tensor:
    """Compose the stand-ins before a place with the place's own `source` [B, n]: [B, entering], -1 for none."""
    if state.source is None:
        return source
    return torch.where(state.source < 0, -1, gather(source, state.source.clamp(min=0)))


@dataclass(frozen=True, eq=False)
class Undo:
    """Brings the tokens that left one place back to those that entered it.

    near: [B, n] leaving position whose value each entering token takes. lost, weights: [B, m] the dropped tokens, whose
    value is `weights` [B, m, k] times every step-th of the leaving tokens instead; None where none was dropped.
    """

    near: Tensor
    lost: Tensor | None = None
    weights: Tensor | None = None
    step: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, K, C] to [B, n, C]."""
        full = gather(x, self.near)
        if self.lost is None or self.weights is None:
            return full
        taken = x[:, : self.weights.shape[2] * self.step : self.step]  # and not what is fused and comes last
        values = torch.bmm(self.weights.to(x.dtype), taken).to(x.dtype)
        return full.scatter(1, self.lost.unsqueeze(-1).expand_as(values), values)


def undo(state: TokenState, reduction: Reduction, x: Tensor) -> Undo:
    """How the tokens x [B, n, C] that enter a place are brought back from those that leave it; a fused token takes no
    part."""
    count = x.shape[1]
    if reduction.matrix is not None:
        return Undo(reduction.source(count))
    source = represented(reduction).source(count)
    lost = dropped(reduction, count)
    if lost.shape[1] == 0:
        return Undo(source)
    metric = placed(x, state)
    step = stride(reduction.kept.shape[1])
    weights = estimate(gather(metric, lost), gather(metric, reduction.kept[:, ::step]))
    return Undo(source.clamp(min=0), lost, weights, step)


def stand_ins(state: TokenState, reduction: Reduction, x: Tensor) -> Tensor:
    """The leaving position whose value each token of x [B, n, C] takes behind a stack of a denoiser, [B, n].

    A merged token is represented by its group, a dropped (or fused) one by the most similar kept token
    (similarity-based recovery, AT-EDM section 3.3), where similar means hidden states and, at less weight, places in
    the image.
    """
    count = x.shape[1]
    lost = dropped(reduction, count)
    if lost.shape[1] == 0:
        return reduction.source(count)
    metric = placed(x, state)
    match = cosine_match(gather(metric, lost), gather(metric, reduction.kept))[1]
    stand_in = Reduction(reduction.kept, lost, match).source(count)
    if not reduction.merges:
        return stand_in
    source = reduction.source(count)
    return torch.where(source < 0, stand_in, source)


def represented(reduction: Reduction) -> Reduction:
    """The same, of which only the tokens that are kept or merged into those have a source."""
    return reduction if reduction.merges else Reduction(reduction.kept)


def dropped(reduction: Reduction, count: int) -> Tensor:
    """Positions [B, m] of the `count` entering tokens that are neither kept nor merged into those, ascending."""
    kept, gone = reduction.kept, count - reduction.kept.shape[1]
    taken = torch.zeros(kept.shape[0], count, dtype=torch.int8, device=kept.device).scatter(1, kept, 1)
    if reduction.merges and reduction.moved is not None:
        taken, gone = taken.scatter(1, reduction.moved, 1), gone - reduction.moved.shape[1]
    return taken.sort(dim=1, stable=True).indices[:, :gone]


def stride(kept: int) -> int:
    """A regression takes every stride-th of the kept tokens, at most MOST."""
    return max(1, -(-kept // MOST))


def regression_cost(lost: int, kept: int, width: int, times: int = 1) -> float:
    """Multiply-adds of an image, whose `lost` tokens of `width` channels are regressed from `kept` ones: similarities,
    weights and, each of the `times` that the grid is restored, values."""
    taken = -(-kept // stride(kept))
    similarities = (taken + lost) * taken * (width + 4)  # behind the channels four of the place
    return similarities + taken**3 / 6 + lost * taken**2 + times * lost * taken * width


def estimate(lost: Tensor, kept: Tensor) -> Tensor:
    """Weights [B, m, k], each row summing to one, with which the values of k tokens estimate those of m others: their
    mean, and a regression of what differs from it. lost: [B, m, D], kept: [B, k, D] what similarity is measured on."""
    device = "cpu" if lost.is_meta else lost.device.type  # of the meta device there is no autocast
    with torch.autocast(device, enabled=False):
        lost, kept = (functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (lost, kept))
        across, among = (torch.exp(SHARPNESS * (x @ kept.transpose(1, 2) - 1)) for x in (lost, kept))
        noise = NOISE * torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device)
        factor = torch.linalg.cholesky_ex(among + noise)[0]  # does not raise: images of NaN stay NaN
        weights = torch.cholesky_solve(across.transpose(1, 2), factor).transpose(1, 2)
        return weights + (1 - weights.sum(2, keepdim=True)) / kept.shape[1]


def attended_stand_ins(
    reduction: Reduction, q: Tensor, k: Tensor, scale: float, log_sums: Tensor | None = None
) -> Tensor:
    """The same for tokens that were dropped, [B, n]: similar is the kept token that a dropped one attends to most, in
    the mean over heads (AT-EDM section 3.3). q, k: [B, H, n, D] as the attention uses them; log_sums: [B, H, n] of each
    row of its logits, where they are known."""
    lost = dropped(reduction, q.shape[2])
    known = None if log_sums is None else gather(log_sums, lost, dim=2)
    match = attention_match(gather(q, lost, dim=2), k, reduction.kept, scale=scale, log_sums=known)
    return Reduction(reduction.kept, lost, match).source(q.shape[2])


def placed(x: Tensor, state: TokenState) -> Tensor:
    """What similarity is measured on: directions of x [B, n, C] with the direction of each token's place appended,
    [B, n, C + 4]."""
    if state.grid is None:
        return x
    if state.origin is None:
        place = table(_places, state.tokens, state.grid, x.dtype, torch.get_default_dtype(), like=x)
        place = place.expand(x.shape[0], -1, -1)
    else:
        place = _encoded(state.origin, state.grid, x.dtype)
    return torch.cat([functional.normalize(x, dim=-1), place], -1)


def _places(
    tokens: int, grid: tuple[int, int], dtype: torch.dtype, _default: torch.dtype, device: torch.device
) -> Tensor:
    return _encoded(torch.arange(tokens, device=device), grid, dtype)


def _encoded(origin: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[..., 4] of each original patch: the directions of its row and its column."""
    rows, columns = grid
    angles = math.pi * torch.stack([(origin // columns) / rows, (origin % columns) / columns], -1)
    return torch.cat([angles.cos(), angles.sin()], -1).to(dtype) * (PLACE_WEIGHT / math.sqrt(2))


def restore_tokens(x: Tensor, state: TokenState, num_prefix_tokens: int) -> Tensor:
    """The full sequence [B, P + entering, C] behind the reduced one x [B, P + n, C]."""
    if not state.undo:
        return x
    body = x[:, num_prefix_tokens:]
    for back in reversed(state.undo):
        body = back(body)
    return torch.cat([x[:, :num_prefix_tokens], body], 1)
