"""Selections by rank."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.reduction import Reduction


def ranked(scores: Tensor) -> Tensor:
    """Positions [B, n] by falling score, ties by rising position."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def keep_top_k(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep the `keep` highest scores [B, n] in their original order, drop the rest."""
    assert scores is not None
    return Reduction(ranked(scores)[:, :keep].sort(dim=1).values)


def fuse_rest(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep the `keep` - 1 highest scores and append the others' sum weighted by their scores (EViT, equation 4)."""
    assert scores is not None
    if keep >= scores.shape[1]:
        return keep_top_k(scores, record, keep)
    order = ranked(scores)
    kept, moved = order[:, : keep - 1].sort(dim=1).values, order[:, keep - 1 :].sort(dim=1).values
    return Reduction(kept, moved, weights=scores.gather(1, moved))


def keep_evenly(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep `keep` evenly spaced tokens: positions floor((j + 1/2) n / keep)."""
    n = record.tokens
    odd = torch.rsub(torch.arange(keep, device=record.origin.device), n, alpha=-2 * n)  # (2 j + 1) n, in one operation
    positions = odd // (2 * keep)
    return Reduction(positions.expand(record.origin.shape[0], -1))
