"""Restoring the full grid: what stands for a token that left, where the grid is read.

Of five choices. A merged token takes its group's value ("unmerge"); whoever left takes an estimate from all kept tokens
("regression"), the value of the kept token that was most similar when it left ("feature", similarity-based recovery,
AT-EDM section 3.3) or that lies nearest in the image ("place"); or it comes back in front of the last block, which runs
on all tokens ("fusion": last-layer fusion, Bergner et al., "Token Cropr", CVPR 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.kernels.attention_match import attention_match
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.kernels.pairwise import nearest
from tokenprune.ordering import order_of
from tokenprune.reduction import Reduction
from tokenprune.regression import estimate, regression_cost, stride
from tokenprune.state import TokenState
from tokenprune.tables import table

if TYPE_CHECKING:
    from tokenprune.method import Restore

PLACE_WEIGHT = 0.5
"""Weight of a token's place beside its hidden state: on a DINOv2's photographs 0.4 to 0.7 restored best."""


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


@dataclass(frozen=True, eq=False)
class Return:
    """Brings the tokens `full` [B, n, C] that entered a place back from `leaving` [B, K, C], those that left it: a
    dropped one as it was, a merged one as it was and with what its group has gained since."""

    reduction: Reduction
    full: Tensor
    leaving: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, K, C] to [B, n, C]."""
        x = x[:, : self.leaving.shape[1]]
        return self.reduction.bring_back(x, self.leaving.to(x.dtype), self.full.to(x.dtype))


def undo(choice: Restore, state: TokenState, reduction: Reduction, x: Tensor, leaving: Tensor) -> Undo | Return:
    """How the tokens x [B, n, C] that enter a place are brought back from `leaving` [B, K, C], those that leave it; a
    fused token takes no part."""
    if choice == "fusion":
        kept = leaving if reduction.mixes else leaving[:, : reduction.kept.shape[1]]
        own = reduction if reduction.mixes else represented(reduction)
        return Return(own, x, kept)
    with torch.no_grad():
        return _undo(choice, state, reduction, x)


def _undo(choice: Restore, state: TokenState, reduction: Reduction, x: Tensor) -> Undo:
    count = x.shape[1]
    if reduction.mixes:
        if choice != "unmerge":
            raise UnsupportedMethod(f"every token is a mixture here, and restore={choice!r} needs some that are kept")
        return Undo(reduction.source(count))
    own = represented(reduction) if choice == "unmerge" else Reduction(reduction.kept)
    lost = dropped(own, count)
    if lost.shape[1] == 0:
        return Undo(own.source(count))
    metric = seen(choice, x, state)
    if choice in ("feature", "place"):
        match = most_alike(choice, gather(metric, lost), gather(metric, reduction.kept))
        return Undo(Reduction(reduction.kept, lost, match).source(count))
    step = stride(reduction.kept.shape[1])
    weights = estimate(gather(metric, lost), gather(metric, reduction.kept[:, ::step]))
    return Undo(own.source(count).clamp(min=0), lost, weights, step)


def seen(choice: Restore, x: Tensor, state: TokenState) -> Tensor:
    """What tokens x [B, n, C] are compared by: hidden states and places [B, n, C + 4], or places alone [B, n, 2].

    Raises:
        UnsupportedModel: places alone, where the patches fill no grid.
    """
    if choice != "place":
        return placed(x, state)
    if state.grid is None:
        raise UnsupportedModel(
            "restore='place' needs patches that fill a grid, and these may lie anywhere; use restore='feature'"
        )
    origin, (rows, columns) = state.origins(x), state.grid
    return torch.stack([origin // columns - rows // 2, origin % columns - columns // 2], -1).float()


def most_alike(choice: Restore, lost: Tensor, kept: Tensor) -> Tensor:
    """Row of kept [B, k, D] that each of lost [B, m, D] is nearest to, of equals the first: [B, m]."""
    if choice == "feature":
        return cosine_match(lost, kept)[1]
    # Nearest is where p q - |q|^2 / 2 is largest: of whole numbers exact, so that equally near ones stay so.
    kept = torch.cat([kept, kept.square() / 2], -1)
    return nearest(torch.cat([lost, torch.full_like(lost, -1.0)], -1), kept, metric="dot")[1]


def restoration_cost(choice: Restore, lost: int, kept: int, width: int, times: int = 1) -> float:
    """Multiply-adds of an image, of which `lost` tokens of `width` channels are brought back `times` from `kept`
    ones."""
    if choice == "feature":
        return lost * kept * (width + 4)
    if choice == "place":
        return lost * kept * 4
    return 0.0 if choice == "fusion" else regression_cost(lost, kept, width, times)


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
    return order_of(taken)[:, :gone]


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
