"""What a forward costs as a function of the token counts, counted on the model's own modules.

Counts come from the formulas of torch's flop counter, and of every operator of ours, on the meta device, where
attention counts (fused attention on a CPU is taken as free). Per block they are exact polynomials of degree two in the
number of tokens, so three counts give the whole function; what restoring the grid costs besides is a closed formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.flop_count import FlopCount

if TYPE_CHECKING:
    from tokenprune.site import Site
    from tokenprune.state import TokenState

Points = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Curve:
    """The polynomial of degree at most two through `points` (tokens, multiply-adds)."""

    points: Points

    def __call__(self, tokens: float) -> float:
        total = 0.0
        for i, (x, y) in enumerate(self.points):
            term = float(y)
            for j, (other, _) in enumerate(self.points):
                if j != i:
                    term *= (tokens - other) / (x - other)
            total += term
        return total


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of one block: before the reduction point, of scoring and reducing there, and behind it."""

    before: Curve
    score: Curve
    behind: Curve


@dataclass(frozen=True)
class CostModel:
    """Multiply-adds of one image's forward. tokens: prunable tokens at the size that was counted. restoring: (block,
    tokens that enter it, tokens that leave it) -> what bringing those back costs, None where a forward does not.
    last_whole: whether all tokens are back in the last block. unpatched: the same without a patch, where a patched
    forward costs less even if it keeps every token."""

    tokens: int
    stem: float
    blocks: tuple[BlockCost, ...]
    head: Curve
    head_sees_all: bool
    restoring: Callable[[int, int, int], float] | None = None
    last_whole: bool = False
    unpatched: CostModel | None = None

    def total(self, tokens: int, leaving: Mapping[int, float] | None = None, *, adaptive: bool = False) -> float:
        """Multiply-adds with `tokens` entering the first block and leaving[block] leaving each place; unpatched
        without `leaving`. adaptive: a place that keeps every token has scored them all the same."""
        if leaving is None and self.unpatched is not None:
            return self.unpatched.total(tokens)
        cost = self.stem * tokens / self.tokens
        left: float = tokens
        for index, block in enumerate(self.blocks):
            if self.last_whole and index == len(self.blocks) - 1:
                left = tokens
            cost += block.before(left)
            keep = left if leaving is None else leaving.get(index, left)
            if keep < left or (adaptive and leaving is not None and index in leaving):
                cost += block.score(left)
                if self.restoring is not None and keep < left:
                    cost += self.restoring(index, round(left), round(keep))
                left = keep
            cost += block.behind(left)
        if self.head_sees_all:  # counted with all tokens of its size, and linear in them
            return cost + self.head(self.tokens) * tokens / self.tokens
        return cost + self.head(left)


@dataclass
class Probe:
    """Counts one forward of a ghost with `tokens` of its tokens: every place scores, and nothing is removed."""

    tokens: int
    keep: Callable[[int], int]
    count: FlopCount | None = None
    marks: list[tuple[int, str, int]] = field(default_factory=list)

    def mark(self, site: Site, point: str) -> None:
        """Note the multiply-adds so far."""
        assert self.count is not None
        self.marks.append((site.index, point, self.count.multiply_adds))

    def leaving(self, state: TokenState) -> int:
        """How many tokens to select at a place: fewer than enter, so that every stage of a selection runs."""
        return self.keep(state.tokens)


def count_flops(model: nn.Module, example: Callable[[], Any], probe: Probe | None = None) -> int:
    """Multiply-adds of model(example()), or of model(**example()); both must be on the meta device."""
    with torch.no_grad():
        inputs = example()
        with (count := FlopCount()):
            if probe is not None:
                probe.count = count
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(inputs)
    return count.multiply_adds


def probe_sizes(tokens: int) -> tuple[int, ...]:
    """Up to three different token counts at which to count, the full one first."""
    return tuple(dict.fromkeys((tokens, max(1, (2 * tokens) // 3), max(1, tokens // 3))))


def cost_model(
    tokens: int,
    depth: int,
    runs: Sequence[tuple[Probe, int]],
    *,
    head_sees_all: bool,
    restoring: Callable[[int, int, int], float] | None = None,
    last_whole: bool = False,
) -> CostModel:
    """The cost model out of counted runs (probe, total) at different token counts."""
    before: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    score: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    behind: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    head: list[tuple[int, int]] = []
    for probe, total in runs:
        at = {(index, point): flops for index, point, flops in probe.marks}
        for index in range(depth):
            start, end = at[index, "enter"], at[index, "leave"]
            scored, reduced = at.get((index, "score"), end), at.get((index, "reduced"), end)
            before[index].append((probe.tokens, scored - start))
            score[index].append((probe.tokens, reduced - scored))
            behind[index].append((probe.tokens, end - reduced))
        head.append((probe.tokens, total - at[depth - 1, "leave"]))
    blocks = tuple(
        BlockCost(Curve(tuple(b)), Curve(tuple(s)), Curve(tuple(a)))
        for b, s, a in zip(before, score, behind, strict=True)
    )
    marks = runs[0][0].marks
    between = pairwise(marks)  # what reads the grid there is computed on all tokens
    stem = marks[0][2] + sum(b[2] - a[2] for a, b in between if a[1] == "leave")
    return CostModel(tokens, stem, blocks, Curve(tuple(head)), head_sees_all, restoring, last_whole)


def pad_tokens(x: Tensor, length: int) -> Tensor:
    """x [B, N, C] with zero tokens appended up to `length`."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], x.shape[2])], 1)
