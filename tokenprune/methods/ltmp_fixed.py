"""LTMP with numbers of tokens in the place of its thresholds (after Bonnaerens and Dambre, TMLR 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import is_number
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import HalfOfEveryBlock
from tokenprune.scores.attention import attention_received
from tokenprune.selection.pairs import halves, merge_best
from tokenprune.selection.top_k import ranked
from tokenprune.tables import positions


@dataclass(frozen=True)
class Dropped:
    """Of the tokens that a block removes, those that it drops, by its share; a model without shares merges all."""

    shares: tuple[float, ...]

    def __call__(self, block: int, depth: int, removed: int) -> int:
        if self.shares and block >= len(self.shares):
            raise UnsupportedMethod(
                f"dropped has shares of {len(self.shares)} blocks, and tokens leave block {block} of {depth}: give each"
                " block its share, or none for merging alone"
            )
        return round(self.shares[block] * removed) if self.shares else 0


def prune_and_merge(scores: Tensor | None, record: AttentionRecord, keep: int, *, dropped: Dropped) -> Reduction:
    """Drop the least important tokens, as many as the block's share says, and merge the most similar pairs of the rest
    until `keep` are left."""
    removed, first = record.tokens - keep, record.num_prefix_tokens % 2
    gone = dropped(record.place, record.depth, removed)
    rest = positions(record.tokens, record.origin).expand_as(record.origin)
    if gone:
        rest = ranked(attention_received(record))[:, : record.tokens - gone].sort(dim=1).values
    a, b = halves(rest, first)
    metric = gather(record.metric, rest) if gone else record.metric
    similarity, match = cosine_match(*halves(metric, first))
    return merge_best(similarity, match, a, b, removed - gone)


@register_method("ltmp_fixed")
def ltmp_fixed(
    *,
    dropped: Sequence[float] = (),
    rate: float = 0.9,
    proportional: bool = True,
    places: tuple[int, ...] | None = None,
) -> Method:
    """Drop and merge the same number of tokens in every image: `ltmp` for models that are compiled or exported.

    `tokenprune.calibrate(model, images, "ltmp", flops=0.6)` finds the numbers that thresholds come to in the mean.
    dropped: of each block's removed tokens the share that is dropped, none where it is empty; those that are not are
    merged, and of what is left at most half can be. rate: kept in each block, where no schedule says it. proportional:
    as in `tome`. Without dropped tokens this is ToMe.
    """
    row = isinstance(dropped, Sequence) and not isinstance(dropped, str)
    if not row or not all(is_number(share) and 0 <= share <= 1 for share in dropped):
        raise UnsupportedMethod(
            f"dropped are shares in [0, 1] of each block, got {dropped!r}; for example dropped=[0.5] * 12"
        )
    drops = Dropped(tuple(map(float, dropped)))
    return Method(
        name="ltmp_fixed",
        paper="after Bonnaerens and Dambre, TMLR 2023",
        schedule=HalfOfEveryBlock(rate, places),
        select=partial(prune_and_merge, dropped=drops),
        merges=True,
        drops=drops,
        proportional=proportional,
        needs=frozenset({"queries", "keys"}),
    )
