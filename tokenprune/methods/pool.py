"""Average pooling of visual tokens: a baseline that every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.windows import keep_smaller_grid


@register_method("pool")
def pool(*, rate: float = 0.25) -> Method:
    """Average the features in the cells of a coarser grid, each in the place of the one nearest to the cell's centre.

    rate: share kept (a quarter: windows of 2 by 2).
    """
    return Method(
        name="pool",
        paper="baseline",
        schedule=Stages(rate),
        select=average_cells,
        needs=frozenset({"language model", "grid"}),
        after_tower=AfterTower(average_cells),
    )


def average_cells(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """Merge the tokens of each cell into that of `keep_smaller_grid`."""
    kept = keep_smaller_grid(scores, record, keep).kept
    if keep == record.tokens:
        return Reduction(kept)
    assert record.grid is not None
    rows, columns = record.grid
    centres = kept[0]
    _, cells = torch.unique_consecutive(centres // columns, return_counts=True)
    coarse = len(cells)
    first = cells.cumsum(0) - cells
    row = torch.arange(rows, device=kept.device)
    band = (row[:, None] >= torch.arange(1, coarse, device=kept.device) * rows // coarse).sum(1)
    column = torch.arange(columns, device=kept.device)
    edges = torch.arange(1, int(cells.max()) + 1, device=kept.device)
    beyond = (column[:, None, None] >= edges * columns // cells[:, None]) & (edges < cells[:, None])
    cell = (first + beyond.sum(2))[:, band].T.flatten()
    moved = torch.ones(rows * columns, dtype=torch.bool, device=kept.device).index_fill(0, centres, False)
    batch = len(kept)
    return Reduction(kept, record.origin[0][moved].expand(batch, -1), cell[moved].expand(batch, -1))
