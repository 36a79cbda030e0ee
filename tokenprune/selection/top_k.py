"""Selections by rank."""

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.ordering import order_of
from tokenprune.reduction import Reduction
from tokenprune.tables import table


def ranked(scores: Tensor) -> Tensor:
    """Positions [B, n] by falling score, ties by rising position."""
    return order_of(scores, descending=True)


def first_of(scores: Tensor, count: Tensor) -> Tensor:
    """Which are among the `count` [B, 1] highest scores of their image, [B, n]."""
    order = ranked(scores)
    place = torch.arange(scores.shape[1], device=scores.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, place < count)


def keep_top_k(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep the `keep` highest scores [B, n] in their original order, drop the rest."""
    assert scores is not None
    own = scores[:1] if scores.stride(0) == 0 else scores  # images with one row of scores have one choice
    return Reduction(ranked(own)[:, :keep].sort(dim=1).values.expand(scores.shape[0], -1))


def keep_all(record: AttentionRecord) -> Reduction:
    """Keep every token, in order."""
    return keep_evenly(None, record, record.tokens)


def fuse_rest(scores: Tensor | None, record: AttentionRecord, keep: int, *, equal: bool = False) -> Reduction:
    """Keep the `keep` - 1 highest scores and append the others' sum weighted by their scores (EViT, equation 4), or
    their mean where `equal`."""
    assert scores is not None
    if keep >= scores.shape[1]:
        return keep_top_k(scores, record, keep)
    order = ranked(scores)
    kept, moved = order[:, : keep - 1].sort(dim=1).values, order[:, keep - 1 :].sort(dim=1).values
    weights = torch.full_like(moved, 1 / moved.shape[1], dtype=scores.dtype) if equal else scores.gather(1, moved)
    return Reduction(kept, moved, weights=weights)


def keep_evenly(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Keep `keep` evenly spaced tokens: positions floor((j + 1/2) n / keep)."""
    return Reduction(table(_evenly, keep, record.tokens, like=record.origin).expand(record.origin.shape[0], -1))


def _evenly(keep: int, tokens: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(keep, device=device) + 1) * tokens // (2 * keep)
