"""Selections on the grid: a token of each window, or a smaller grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.reduction import Reduction, Rows
from tokenprune.selection.top_k import ranked
from tokenprune.tables import table


@dataclass(frozen=True)
class Split:
    """Tokens of I images, or of all, in two sets: order [I, n] holds the positions of the others, then those of the
    chosen tokens, each rising. chosen: how many these are."""

    order: Tensor
    chosen: int

    def of(self, row: int) -> Split:
        """That of one image alone."""
        return Split(self.order[row : row + 1], self.chosen)


def split_by_windows(scores: Tensor | None, record: AttentionRecord, sy: int, sx: int) -> Split:
    """The best-scored token of each window is chosen, without scores its first; one split for each row of `scores`.

    Windows are sy rows by sx columns from the top left corner; what remains at the edges is in none.
    """
    assert record.grid is not None
    rows, columns = record.grid
    down, across = rows // sy, columns // sx
    if scores is None:
        return Split(table(_by_first, record.grid, sy, sx, like=record.origin), down * across)
    images = scores.shape[0]
    inside = scores.view(images, rows, columns)[:, : down * sy, : across * sx]
    best = inside.reshape(images, down, sy, across, sx).transpose(2, 3).flatten(3).argmax(-1)
    chosen = table(_firsts, record.grid, sy, sx, like=record.origin) + best // sx * columns + best % sx
    return Split(_order(chosen.flatten(1), rows * columns), down * across)


def merge_into_windows(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, sy: int = 2, sx: int = 2
) -> Reduction:
    """Merge the n - `keep` tokens most similar to a window's chosen one into it (ToMe for Stable Diffusion, Bolya and
    Hoffman, CVPR 2023 workshops, section 4). Similar is the cosine of hidden states; the tokens that leave: the rest
    of the others, then the chosen ones."""
    if keep == record.tokens:
        return Reduction(record.origin)
    return merge_into_chosen(split_by_windows(scores, record, sy, sx), record, keep)


def merge_into_chosen(split: Split, record: AttentionRecord, keep: int) -> Reduction:
    """The same with a split that is known."""
    order = split.order.expand(record.origin.shape[0], -1)
    away = record.tokens - split.chosen
    hidden = Rows(order, record.tokens).take(record.hidden)
    similarity, match = cosine_match(hidden[:, :away], hidden[:, away:])
    by_rank = ranked(similarity)
    merged = record.tokens - keep
    others = gather(order[:, :away], by_rank)
    return Reduction(
        kept=torch.cat([others[:, merged:].sort(dim=1).values, order[:, away:]], 1),
        moved=others[:, :merged],
        target=gather(match, by_rank[:, :merged]) + (away - merged),
    )


def _firsts(grid: tuple[int, int], sy: int, sx: int, device: torch.device) -> Tensor:
    """Position of the first token of each window, [windows down, windows across]."""
    rows, columns = grid
    down, across = torch.arange(rows // sy, device=device), torch.arange(columns // sx, device=device)
    return down[:, None] * sy * columns + across * sx


def _by_first(grid: tuple[int, int], sy: int, sx: int, device: torch.device) -> Tensor:
    return _order(_firsts(grid, sy, sx, device).reshape(1, -1), grid[0] * grid[1])


def _order(chosen: Tensor, tokens: int) -> Tensor:
    """The positions not among `chosen` [I, W], then these, each rising, [I, tokens]."""
    taken = torch.zeros(chosen.shape[0], tokens, dtype=torch.int8, device=chosen.device).scatter(1, chosen, 1)
    return taken.sort(dim=1, stable=True).indices


def keep_smaller_grid(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """The `keep` tokens nearest to the centres of a coarser grid's cells ("nearest-exact" down-sampling).

    The coarser grid has the aspect of the tokens'; where `keep` fills none, some of its rows have a cell more.
    """
    assert record.grid is not None
    kept = table(_cell_centres, record.grid, keep, like=record.origin)
    return Reduction(kept.expand(record.origin.shape[0], -1))


def _cell_centres(grid: tuple[int, int], keep: int, device: torch.device) -> Tensor:
    rows, columns = grid
    coarse = min(rows, max(-(-keep // columns), round((keep * rows / columns) ** 0.5)))
    positions = []
    for i in range(coarse):
        row = (2 * i + 1) * rows // (2 * coarse)
        cells = (i + 1) * keep // coarse - i * keep // coarse
        positions += [row * columns + (2 * j + 1) * columns // (2 * cells) for j in range(cells)]
    return torch.tensor(positions, device=device)
