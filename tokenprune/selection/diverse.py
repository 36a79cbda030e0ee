"""Selections of tokens that are unlike each other. None holds the map of all similarities: a choice needs one row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.kernels.merge import gather

_ROWS = 2**22  # similarities held at a time


def farthest_first(x: Tensor, count: int) -> Tensor:
    """`count` of the tokens x [B, n, C], as [B, count] in the order of choice (DivPrune, Alvar et al., CVPR 2025).

    Distance is 1 - cosine. The first is the token whose nearest other is farthest, each next the one farthest from its
    nearest chosen (greedy max-min diversity); ties go to the lower position.
    """
    unit = functional.normalize(x.float(), dim=-1)
    chosen = [(1 - nearest_other(unit)).argmax(1, keepdim=True)]
    nearest = torch.full(unit.shape[:2], float("inf"), device=x.device)
    for _ in range(count - 1):
        distance = 1 - (unit @ gather(unit, chosen[-1]).transpose(1, 2)).squeeze(2)
        nearest = torch.minimum(nearest, distance).scatter(1, chosen[-1], float("-inf"))
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def nearest_other(unit: Tensor) -> Tensor:
    """Cosine of each token's most similar other one: unit [B, n, C] -> [B, n]; -1 of a single token."""
    batch, tokens = unit.shape[:2]
    best = []
    for part in torch.split(torch.arange(tokens, device=unit.device), max(1, _ROWS // (batch * tokens))):
        similarity = unit[:, part] @ unit.transpose(1, 2)
        best.append(similarity.scatter(2, part.view(1, -1, 1).expand(batch, -1, 1), -1.0).amax(-1))
    return torch.cat(best, 1)


def greedy_determinant(x: Tensor, quality: Tensor, count: int) -> Tensor:
    """`count` of the tokens x [B, n, C] by greedy inference in a determinantal point process, [B, count] in the order
    of choice (Chen et al., NeurIPS 2018, algorithm 1).

    Its kernel is diag(q) S diag(q), S the cosines and q the quality [B, n] of each token: a choice adds most to the
    determinant of the chosen ones' kernel.
    """
    unit = functional.normalize(x.float(), dim=-1)
    left = quality.float().square() * unit.square().sum(-1)
    rows: list[Tensor] = []
    chosen: list[Tensor] = []
    for _ in range(count):
        best = left.argmax(1, keepdim=True)
        row = gather(quality.float(), best) * quality.float() * (unit @ gather(unit, best).transpose(1, 2)).squeeze(2)
        if rows:
            known = torch.stack(rows, 1)
            row = row - (gather(known, best, dim=2) * known).sum(1)
        row = row / gather(left, best).clamp_min(torch.finfo(left.dtype).tiny).sqrt()
        rows.append(row)
        chosen.append(best)
        left = (left - row.square()).scatter(1, torch.cat(chosen, 1), float("-inf"))
    return torch.cat(chosen, 1)
