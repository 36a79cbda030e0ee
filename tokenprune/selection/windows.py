"""Selections on the grid: a token of each window, or a smaller grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.kernels.matching import cosine_match
from tokenprune.ordering import order_of
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction, Rows
from tokenprune.selection.pairs import merge_best
from tokenprune.selection.top_k import first_of
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

    Raises:
        BudgetError: the grid is smaller than a window.
    """
    assert record.grid is not None
    rows, columns = record.grid
    down, across = rows // sy, columns // sx
    if down * across == 0:
        raise BudgetError(
            f"a window of {sy} x {sx} tokens does not fit into the grid of {rows} x {columns}; use sy={min(sy, rows)},"
            f" sx={min(sx, columns)} or smaller"
        )
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
    return merge_best(similarity, match, order[:, :away], order[:, away:], record.tokens - keep)


def pool_similar_windows(record: AttentionRecord, threshold: float, least: int) -> RaggedReduction:
    """Merge windows of 2 x 2 tokens whose hidden states are alike, each into its last token (ALGM, Norouzi et al., CVPR
    2024, section 3.2): where the mean cosine of its pairs is at least the threshold, and of the next as many that
    `least` tokens go. Windows start at the top left corner; what remains at the edges is in none.

    Raises:
        UnsupportedMethod: the tokens fill no grid.
        BudgetError: there are too few windows.
    """
    if record.grid is None:
        raise UnsupportedMethod("pooling windows needs tokens that fill a grid; merge pairs instead ('tome')")
    columns, n, device = record.grid[1], record.tokens, record.origin.device
    corner = torch.arange(n // columns * columns, device=device).view(-1, columns)[: n // columns // 2 * 2 : 2]
    corner = corner[:, : columns // 2 * 2 : 2].flatten()
    window = torch.stack([corner, corner + 1, corner + columns, corner + columns + 1], 1)  # [W, 4]
    # Where costs are counted, some of the rows are not there.
    if -(-least // 3) > len(window) and n == record.grid[0] * columns:
        raise BudgetError(
            f"{n - least} tokens asked, and pooling windows of 2 x 2 leaves {n - 3 * len(window)} of {n} at least; ask"
            " for more there"
        )
    unit = functional.normalize(record.hidden[:, record.num_prefix_tokens :].float(), dim=-1)[:, window]
    # The sum over all pairs of four is the square of their sum, less their own squares.
    alike = (unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))) / 12
    count = (alike >= threshold).sum(1, keepdim=True).clamp_min(-(-least // 3))
    pooled = first_of(alike, count)
    target = torch.where(pooled.unsqueeze(2), window[:, 3:], window).flatten(1)
    own = torch.arange(n, device=device).expand_as(record.origin)
    return RaggedReduction(own.scatter(1, window.flatten().expand_as(target), target))


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
    return order_of(taken)


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
