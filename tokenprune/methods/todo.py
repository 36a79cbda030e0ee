"""ToDo: token down-sampling (Smith, Saxena and Saha, "ToDo: Token Downsampling for Efficient Generation of
High-Resolution Images", 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenprune.errors import BudgetError
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import GridFactor
from tokenprune.selection.windows import keep_smaller_grid


@dataclass(frozen=True)
class Factors:
    """1 / f² of the tokens at each level from the finest on; levels behind the last factor are left alone."""

    factors: tuple[int, ...]

    def __call__(self, latents: int | None, counts: Sequence[int]) -> Mapping[int, float]:
        return {n: 1 / f**2 for n, f in zip(counts, self.factors, strict=False) if f > 1}


@register_method("todo")
def todo(*, factor: int | tuple[int, ...] = 2) -> Method:
    """Take keys and values of the self-attention from a coarser grid; every query stays, so nothing is to restore.

    factor: by which rows and columns are fewer, at the finest level that has attention, or of the levels from that on
    ((2, 1) is (2,)). A budget keep= is the share of the tokens that keys and values are computed of, 1 / factor².
    """
    factors = (factor,) if isinstance(factor, int) else tuple(factor)
    if any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in factors) or max(factors, default=1) == 1:
        raise BudgetError(f"factor={factor!r}: whole numbers, one above 1 among them; for example factor=2")
    return Method(
        name="todo",
        paper="Smith et al., ToDo, 2024",
        schedule=GridFactor(1 / max(factors) ** 2),
        select=keep_smaller_grid,
        needs=frozenset({"stacks", "grid"}),
        stack_share=1 / max(factors) ** 2,
        parts=("keys",),
        levels=Factors(factors),
    )
