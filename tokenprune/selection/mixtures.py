"""Mixtures: every token that leaves is a learned weighted sum of all that came."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.learning import Lesson
from tokenprune.reduction import Reduction
from tokenprune.selection.top_k import keep_all


def mix(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """The mixtures that the learned part of the place weighs: (tokens [B, n, C], K) -> weights [B, K, n]. Where all are
    kept, nothing is done."""
    if keep == record.tokens:
        return keep_all(record)
    part: Any = record.learned
    weights = part(record.hidden[:, record.num_prefix_tokens :], keep)
    return Reduction(weights.detach().argmax(-1), matrix=weights)


def no_penalty(lesson: Lesson, flops: float) -> float:
    """Nothing is added to the loss where the number of tokens is the budget's."""
    return 0.0
