"""ToMe for Stable Diffusion (Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR 2023 workshops)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, MergedShare
from tokenprune.scores.fixed import hashed_scores_of_peers
from tokenprune.selection.windows import Split, merge_into_chosen, merge_into_windows, split_by_windows


@dataclass(frozen=True)
class Windows(MergedShare):
    """Stages that leave at least one token of each window of `area` tokens."""

    area: int = 4

    def fewest(self, entering: int, layout: Layout) -> int:
        return -(-entering // self.area)


@dataclass(frozen=True)
class FinestLevels:
    """The stacks that are down-sampled at most so many times from the latents; None for the finest that there are."""

    share: float
    max_downsample: int | None

    def __call__(self, latents: int | None, counts: Sequence[int]) -> Mapping[int, float]:
        if self.max_downsample is None:
            return dict.fromkeys(counts[:1], self.share)
        if latents is None:
            raise BudgetError("max_downsample counts from latents with rows and columns; leave it out here")
        return {n: self.share for n in counts if math.ceil(math.sqrt(latents // n)) <= self.max_downsample}


def merge_into_random(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, seed: int, sy: int, sx: int
) -> Reduction:
    """Merge into a random token of each window, another one at each step and place, the same of all images."""
    if keep == record.tokens:
        return Reduction(record.origin)

    def split() -> Split:
        return split_by_windows(hashed_scores_of_peers(record, seed), record, sy, sx)

    # On a GPU the draw takes as long as all else here, and of all places no longer than of one.
    splits = record.once(("tomesd", seed, sy, sx, record.grid), split)
    return merge_into_chosen(splits.of((record.peers or (record.place,)).index(record.place)), record, keep)


@register_method("tomesd")
def tomesd(
    *,
    ratio: float = 0.5,
    max_downsample: int | None = None,
    sx: int = 2,
    sy: int = 2,
    use_rand: bool = True,
    seed: int = 0,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
) -> Method:
    """Merge similar tokens around the self-attention of each block, and give every token back what its group got.

    ratio: share of the tokens that is merged away, at most 1 - 1 / (sx sy); a budget keep= is 1 - ratio.
    max_downsample: blocks of which stacks merge, those at most so many times (1, 2, 4, 8) smaller than the latents in
    each direction; None (not the original's 1, which on SDXL is no block at all) is the finest level that has
    attention, and the report names it. sx, sy: width and height of the windows of which one token each takes the
    others in, a random one of each step, block and `seed`, the same for all images, or with use_rand=False the first.
    merge_crossattn, merge_mlp: around these too, which its authors advise against.
    """
    if min(sx, sy) < 1 or sx * sy < 2:
        raise BudgetError(f"sx={sx}, sy={sy}: a window has two tokens or more; the original's are sx=2, sy=2")
    if not 0.0 < ratio <= 1 - 1 / (sx * sy):
        raise BudgetError(
            f"ratio={ratio} cannot be merged away: a token of each window of {sx} x {sy} stays, so it is in"
            f" (0, {1 - 1 / (sx * sy):.3g}]; widen the windows for more"
        )
    parts = ("attention", *(["cross"] if merge_crossattn else []), *(["mlp"] if merge_mlp else []))
    return Method(
        name="tomesd",
        paper="Bolya and Hoffman, Token Merging for Fast Stable Diffusion, CVPR 2023 workshops",
        schedule=Windows(1 - ratio, area=sx * sy),
        select=partial(merge_into_windows, sy=sy, sx=sx)
        if not use_rand
        else partial(merge_into_random, seed=seed, sy=sy, sx=sx),
        needs=frozenset({"stacks", "grid"}),
        stack_share=1 - ratio,
        parts=parts,
        levels=FinestLevels(1 - ratio, max_downsample),
    )
