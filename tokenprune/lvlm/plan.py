"""From a budget to the number of tokens that each image keeps."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError
from tokenprune.schedule import kept_count, largest_share


def counts_of(budget: Budget, share: float, sizes: Sequence[int]) -> list[int]:
    """Visual tokens that each image of one prompt keeps.

    sizes: tokens of each (separators not counted). share: kept where the budget is the method's own. tokens= is for
    each image in the mean: images share tokens x images in proportion to their size.

    Raises:
        BudgetError: more than there are.
    """
    if budget.kind == "tokens":
        return share_out(int(budget.value) * len(sizes), sizes, str(budget))
    if budget.kind == "keep":
        share = budget.value
    return [kept_count(share, size) for size in sizes]


def share_out(total: int, sizes: Sequence[int], asked: str) -> list[int]:
    """`total` tokens for images of these sizes in proportion, at least one each (largest remainders)."""
    have = sum(sizes)
    if total > have:
        raise BudgetError(
            f"{asked} asked, but the prompt's {len(sizes)} images have {have} visual tokens; use at most"
            f" tokens={have // len(sizes)}"
        )
    exact = [total * size / have for size in sizes]
    counts = [max(1, int(part)) for part in exact]
    for i in sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i)):
        if sum(counts) < total and counts[i] < sizes[i]:
            counts[i] += 1
    while sum(counts) > total:  # small images keep one token though their share is less
        counts[counts.index(max(counts))] -= 1
    return counts


def refuse_nothing(budget: Budget, sizes: Sequence[int], counts: Sequence[int]) -> None:
    """Raise where a share below 1 leaves out no token of any image."""
    if budget.kind != "tokens" and list(sizes) == list(counts):
        most = max(sizes)
        raise BudgetError(
            f"{budget} of {most} tokens drops none; use keep={largest_share(most):.3f} or less, or keep=1.0"
        )


def whole_rows(budget: Budget, count: int, grid: tuple[int, int]) -> int:
    """The nearest number of tokens that fills rows of a grid, at least one row.

    Raises:
        BudgetError: tokens were asked for, and fill none.
    """
    rows, columns = grid
    nearest = columns * min(rows, max(1, round(count / columns)))
    if budget.kind == "tokens" and nearest != count:
        raise BudgetError(
            f"{budget} are no whole rows of {columns} tokens; use tokens={nearest}, another multiple of {columns}, or"
            " keep="
        )
    return nearest
