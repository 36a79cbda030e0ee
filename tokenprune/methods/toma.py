"""ToMA: token merge with attention (Lu et al., "ToMA: Token Merge with Attention for Diffusion Models", ICML 2025)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError
from tokenprune.method import Method, Reuse
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import MergedShare
from tokenprune.selection.facility import attend_to_destinations, facility_destinations


def select(scores: Tensor | None, record: AttentionRecord, keep: int, *, tiles: int, temperature: float) -> Reduction:
    """Destinations by facility location in each tile, weights by attention to them; nothing where all are kept."""
    if keep == record.tokens:
        return Reduction(record.origin)
    return attend_to_destinations(facility_destinations(record, keep, tiles), record, temperature)


def weigh(reduction: Reduction, record: AttentionRecord, *, temperature: float) -> Reduction:
    """The same destinations with weights of the tokens as they are now."""
    return attend_to_destinations(reduction.kept, record, temperature)


@register_method("toma")
def toma(
    *,
    ratio: float = 0.5,
    tiles: int = 8,
    temperature: float = 0.1,
    select_every: int = 10,
    weigh_every: int = 5,
    merge_crossattn: bool = True,
    merge_mlp: bool = True,
) -> Method:
    """Merge tokens by their attention to a few that represent all, around each part of a block, by products alone.

    ratio: share of the tokens that is merged away; a budget keep= is 1 - ratio. tiles: the grid is cut in tiles x tiles
    parts, each of which chooses its own. temperature: cosines are divided by it before the softmax. select_every,
    weigh_every: steps of the run after which tokens are chosen anew, and weighed anew; the blocks of a stack share
    both. merge_crossattn, merge_mlp: around these too. All tokens kept is the unpatched model: the paper's merge has no
    identity of its own.
    """
    if not 0.0 < ratio < 1.0:
        raise BudgetError(f"ratio={ratio!r} is the share merged away, in (0, 1)")
    if min(tiles, select_every, weigh_every) < 1 or temperature <= 0:
        raise BudgetError("tiles, select_every and weigh_every are whole numbers from 1 on, temperature is above 0")
    return Method(
        name="toma",
        paper="Lu et al., ToMA, ICML 2025",
        schedule=MergedShare(1 - ratio),
        select=partial(select, tiles=tiles, temperature=temperature),
        needs=frozenset({"stacks", "grid"}),
        stack_share=1 - ratio,
        parts=("attention", *(["cross"] if merge_crossattn else []), *(["mlp"] if merge_mlp else [])),
        reuse=Reuse(select_every, weigh_every, partial(weigh, temperature=temperature)),
    )
