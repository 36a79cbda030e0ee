"""What a method does in a vision-language model; it knows tensors and no library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.reduction import Reduction


@dataclass(frozen=True)
class AfterTower:
    """Which visual tokens go on from the tower to the language model, chosen for each image.

    select: (scores [B, n] or None, record, K) -> the Reduction to K tokens, whose `kept` are the positions they take.
    The record holds the features [B, n, C] as the language model would get them; `metric` is the mean over heads of the
    tower's keys where `keys`. score: record of the tower's layer -> importance [B, n] of its patches; where a
    placeholder stands for several patches it has the mean of theirs, as it does of keys. layer: which one, -1 the last;
    None the one whose output the language model gets.
    """

    select: Callable[[Tensor | None, AttentionRecord, int], Reduction]
    score: Callable[[AttentionRecord], Tensor] | None = None
    keys: bool = False
    layer: int | None = None

    @property
    def looks_at_attention(self) -> bool:
        """Whether queries and keys of the tower are needed."""
        return self.score is not None or self.keys
