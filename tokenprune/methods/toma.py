"""ToMA: token merge with attention (Lu et al., "ToMA: Token Merge with Attention for Diffusion Models", ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError
from tokenprune.method import Method, Reuse
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import MergedShare
from tokenprune.selection.facility import attend_to_destinations, attend_within_tiles, facility_destinations
from tokenprune.selection.tiles import Tiling, cut


@dataclass(frozen=True)
class Tiles:
    """How destinations are chosen and weighed; see `toma`."""

    tiles: int
    within_tiles: bool
    temperature: float

    def select(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
        """Destinations by facility location in each tile, and their weights; nothing where all are kept."""
        if keep == record.tokens:
            return Reduction(record.origin)
        return self._attend(facility_destinations(record, self._tiling(record, keep)), record)

    def weigh(self, reduction: Reduction, record: AttentionRecord) -> Reduction:
        """The same destinations with weights of the tokens as they are now."""
        return self._attend(reduction.kept, record)

    def _attend(self, destinations: Tensor, record: AttentionRecord) -> Reduction:
        if not self.within_tiles:
            return attend_to_destinations(destinations, record, self.temperature)
        tiling = self._tiling(record, destinations.shape[1])
        return attend_within_tiles(destinations, record, self.temperature, tiling)

    def _tiling(self, record: AttentionRecord, keep: int) -> Tiling:
        assert record.grid is not None
        return cut(record.grid, keep, self.tiles)


@register_method("toma")
def toma(
    *,
    ratio: float = 0.5,
    tiles: int = 8,
    within_tiles: bool = True,
    temperature: float = 0.03,
    select_every: int = 10,
    weigh_every: int = 5,
    merge_crossattn: bool = True,
    merge_mlp: bool = True,
) -> Method:
    """Merge tokens by their attention to a few that represent all, around each part of a block, by products alone.

    ratio: share of the tokens that is merged away; a budget keep= is 1 - ratio. tiles: the grid is cut in tiles x tiles
    parts, each of which chooses its own (fewer, where there would be parts without one). within_tiles: whether a token
    goes into those of its own tile alone; into those of the whole image the products cost more than the blocks of a
    small model, and average much more. temperature: cosines are divided by it before the softmax. Which of the two the
    paper means by default, and its temperature, is not known here; these gave the nearest pictures on the small models.
    select_every, weigh_every: steps of the run after which tokens are chosen anew, and weighed anew; the blocks of a
    stack share both. merge_crossattn, merge_mlp: around these too. All tokens kept is the unpatched model: the paper's
    merge has no identity of its own.
    """
    if not 0.0 < ratio < 1.0:
        raise BudgetError(f"ratio={ratio!r} is the share merged away, in (0, 1)")
    if min(tiles, select_every, weigh_every) < 1 or temperature <= 0:
        raise BudgetError("tiles, select_every and weigh_every are whole numbers from 1 on, temperature is above 0")
    chosen = Tiles(tiles, within_tiles, temperature)
    return Method(
        name="toma",
        paper="Lu et al., ToMA, ICML 2025",
        schedule=MergedShare(1 - ratio),
        select=chosen.select,
        needs=frozenset({"stacks", "grid"}),
        stack_share=1 - ratio,
        parts=("attention", *(["cross"] if merge_crossattn else []), *(["mlp"] if merge_mlp else [])),
        reuse=Reuse(select_every, weigh_every, chosen.weigh),
    )
