"""POMT: prune once, and keep one more token for what is gone (Eliopoulos et al., "Pruning One More Token is Enough:
Leveraging Latency-Workload Non-Linearities for Vision Transformers on the Edge", WACV 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count
from tokenprune.errors import BudgetError
from tokenprune.kernels.attention_peak import attention_peak
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, checked_places
from tokenprune.selection.top_k import fuse_rest


@dataclass(frozen=True)
class OnePlace:
    """A number r of tokens removed at one block, a quarter of the depth (block 3 of 12) where it is not named."""

    option: ClassVar[str] = "r"

    r: int = 56
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checked_count(self.option, self.r, smallest=0, example=56)
        if self.at is not None and (not isinstance(self.at, Sequence) or len(self.at) != 1):
            raise BudgetError(f"pomt prunes at one place, got places={self.at!r}; for example places=(3,)")

    def places(self, layout: Layout) -> tuple[int, ...]:
        return (layout.depth // 4,) if self.at is None else checked_places(self.at, layout.depth)

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        return (max(self.fewest(tokens, layout), tokens - round(strength * tokens)),)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        if tokens - self.r < self.fewest(tokens, layout):
            raise BudgetError(
                f"r={self.r} of {tokens} tokens cannot be removed; use r={tokens // 3} or a budget such as flops=0.8"
            )
        return (tokens - self.r,)

    def fewest(self, entering: int, layout: Layout) -> int:
        return min(2, entering)


@register_method("pomt")
def pomt(*, r: int = 56, places: tuple[int, ...] | None = None) -> Method:
    """Drop tokens once, by how much attention they get and how large their values are, and append the mean of those
    that are dropped.

    A token's score is what all patches pay it, of the heads the one that pays most, over the largest such sum in the
    image (in the published code in the batch), and the softmax over all tokens of the sum over channels of its value,
    of the heads the largest in each channel (section 4.1).

    r: tokens removed. The paper finds it offline for each device and batch by a grid of measured latencies and of
    accuracy (`tokenprune.evals.latency_grid`); 56 is its r for a DeiT-S in batches of 4 on an AGX Orin.
    """
    return Method(
        name="pomt",
        paper="Eliopoulos et al., Pruning One More Token, WACV 2025",
        schedule=OnePlace(r, places),
        score=attention_and_value,
        select=partial(fuse_rest, equal=True),
        needs=frozenset({"queries", "keys", "values"}),
    )


def attention_and_value(record: AttentionRecord) -> Tensor:
    """The score of each prunable token, [B, n]."""
    (q, k), prefix = record.rotated(), record.num_prefix_tokens
    received = attention_peak(q, k, first=prefix, scale=record.scale, bias=record.bias)[:, prefix:]
    values = record.v.to(received.dtype).amax(1).sum(-1).softmax(-1)[:, prefix:]
    return received / received.amax(1, keepdim=True) + values
