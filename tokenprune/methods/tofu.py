"""ToFu: prune early, merge late, and keep norms (Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and
Token Merging", WACV 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_share
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import EveryBlock
from tokenprune.selection.pairs import merge_similar_pairs


@dataclass(frozen=True)
class PruneThenMerge:
    """ToMe's pairs: before a share of the depth one token of a pair is dropped, from there on both are merged."""

    merge_from: float

    def prunes(self, block: int, depth: int) -> bool:
        """Whether a block is one of the early ones."""
        return block < self.merge_from * depth

    def drops(self, block: int, depth: int, removed: int) -> int:
        """Of the tokens that a block removes, those that it drops."""
        return removed if self.prunes(block, depth) else 0

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        pairs = merge_similar_pairs(scores, record, keep)
        if self.prunes(record.place, record.depth):
            return Reduction(pairs.kept)
        return replace(pairs, average="norm")


@register_method("tofu")
def tofu(
    *, r: int = 8, merge_from: float = 0.5, proportional: bool = True, places: tuple[int, ...] | None = None
) -> Method:
    """Of the r most similar pairs in each block drop one token in early blocks, and merge both in late ones, where the
    average is made as long as the longest of its group (MLERP, section 3.3).

    r: tokens removed per block, where no other budget is given. merge_from: share of the depth from which on pairs are
    merged. proportional: add log(size) to the attention logits of a merged token. The paper's own values of the last
    two are not verified here. A mean over patches is taken over the full grid, on which dropped ones are estimated.
    """
    stage = PruneThenMerge(checked_share("merge_from", merge_from))
    return Method(
        name="tofu",
        paper="Kim et al., Token Fusion, WACV 2024",
        schedule=EveryBlock(r, at=places),
        select=stage,
        merges=True,
        drops=stage.drops,
        proportional=proportional,
        needs=frozenset({"keys"}),
    )
