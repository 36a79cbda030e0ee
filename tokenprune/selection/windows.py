"""Selections on the grid: a token of each window, or a smaller grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError, UnsupportedMethod
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction
from tokenprune.selection.pairs import merge_best
from tokenprune.selection.top_k import first_of


def split_by_windows(scores: Tensor | None, record: AttentionRecord, sy: int, sx: int) -> tuple[Tensor, Tensor]:
    """(positions of the others [B, n - W], of the best-scored token of each window [B, W]), each rising.

    Windows are sy rows by sx columns from the top left corner; what remains at the edges is in none. Without scores
    the first token of a window is taken.
    """
    assert record.grid is not None
    rows, columns = record.grid
    down, across = rows // sy, columns // sx
    batch, device = record.origin.shape[0], record.origin.device
    images = 1 if scores is None or scores.stride(0) == 0 else batch  # of which the windows' choices may differ
    first = torch.arange(down, device=device)[:, None] * sy * columns + torch.arange(across, device=device) * sx
    if scores is None:
        chosen = first.expand(images, -1, -1)
    else:
        inside = scores[:images].view(images, rows, columns)[:, : down * sy, : across * sx]
        inside = inside.reshape(images, down, sy, across, sx).transpose(2, 3).flatten(3)
        best = inside.argmax(-1)
        chosen = first + best // sx * columns + best % sx
    taken = torch.zeros(images, rows * columns, dtype=torch.int8, device=device).scatter(1, chosen.flatten(1), 1)
    order = taken.sort(dim=1, stable=True).indices.expand(batch, -1)
    others = order.shape[1] - down * across
    return order[:, :others], order[:, others:]


def merge_into_windows(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, sy: int = 2, sx: int = 2
) -> Reduction:
    """Merge the n - `keep` tokens most similar to a window's chosen one into it (ToMe for Stable Diffusion, Bolya and
    Hoffman, CVPR 2023 workshops, section 4). Similar is the cosine of hidden states; the tokens that leave: the rest
    of the others, then the chosen ones."""
    if keep == record.tokens:
        return Reduction(record.origin)
    others, chosen = split_by_windows(scores, record, sy, sx)
    similarity, match = cosine_match(gather(record.hidden, others), gather(record.hidden, chosen))
    return merge_best(similarity, match, others, chosen, record.tokens - keep)


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


def keep_smaller_grid(scores: Tensor | None, record: AttentionRecord, keep: int) -> Reduction:
    """The `keep` tokens nearest to the centres of a coarser grid's cells ("nearest-exact" down-sampling).

    The coarser grid has the aspect of the tokens'; where `keep` fills none, some of its rows have a cell more.
    """
    assert record.grid is not None
    rows, columns = record.grid
    coarse = min(rows, max(-(-keep // columns), round((keep * rows / columns) ** 0.5)))
    positions = []
    for i in range(coarse):
        row = (2 * i + 1) * rows // (2 * coarse)
        cells = (i + 1) * keep // coarse - i * keep // coarse
        positions += [row * columns + (2 * j + 1) * columns // (2 * cells) for j in range(cells)]
    kept = torch.tensor(positions, device=record.origin.device)
    return Reduction(kept.expand(record.origin.shape[0], -1))
