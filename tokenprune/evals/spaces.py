"""What a search for schedules goes through: tokens that leave the blocks of an image tower, or windows that those of a
model of windows compute."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import nn

import tokenprune
from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.evals.candidates import Genes, at_cost, genes_of, without_idle
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.family import active_patches
from tokenprune.patch import Patch
from tokenprune.registry import make_method, own_budget
from tokenprune.solver import Counts, shares_of
from tokenprune.windows.costs import WindowCosts
from tokenprune.windows.patch import WindowsPatch
from tokenprune.windows.plan import by_cost
from tokenprune.windows.tiling import Grid


class Space(Protocol):
    """The schedules of a method on a model. depth: how many blocks can reduce. most: share of the multiply-adds where
    nothing is removed."""

    depth: int
    most: float

    def own(self, model: nn.Module) -> Counts:
        """Of each block where `model` is patched to reduce, what is left there."""

    def solved(self, genes: Genes, aim: float) -> Counts:
        """What is left in each block at a share `aim` of the multiply-adds.

        Raises:
            BudgetError: these genes cannot reach it.
        """

    def genes(self, counts: Counts) -> Genes:
        """Genes that give `counts`."""

    def schedule(self, counts: Counts) -> dict[int | str, float]:
        """`counts` as `patch` takes them."""


def space_of(base: nn.Module, method: str, options: dict[str, Any], restore: str | None = None) -> Space:
    """The space of a method on an unpatched model. options: of the method; restore: as `patch` takes it.

    Raises:
        BudgetError: an option says what is to be found.
        UnsupportedMethod, UnsupportedModel: no schedule says what it costs.
    """
    make_method(method, options)
    given = sorted({"places", own_budget(method)} & options.keys())
    if given:
        raise BudgetError(f"where and how strongly {method} reduces is what a search finds; leave out {given[0]}=")
    probe = tokenprune.patch(shared_copy(base), method, keep=1.0, restore=restore, **options)
    patches = list(active_patches(probe).values())
    if not all(isinstance(found, (Patch, WindowsPatch)) for found in patches):
        raise UnsupportedModel(
            f"search is of image towers and of whole windows, and {method} on {type(base).__name__} is neither; name"
            " schedule= yourself"
        )
    [patch] = patches
    if isinstance(patch, WindowsPatch):
        return Windows(patch)
    assert isinstance(patch, Patch)
    if patch.method.adaptive:
        raise UnsupportedMethod(
            f"{method} keeps a different number of tokens in each image, so no schedule says what it costs; search for"
            " one of a method with a fixed number, such as 'top_k'"
        )
    blocks = range(patch.depth - (patch.method.restoration == "fusion"))  # all tokens are back in front of the last
    tokenprune.patch(probe, method, schedule=dict.fromkeys(blocks, 0.9), restore=restore, **options)
    [patch] = active_patches(probe).values()
    assert isinstance(patch, Patch)
    return Tokens(patch)


class Tokens:
    """Tokens that leave the blocks of an image tower, of those that enter; `patch` reduces in each of them."""

    def __init__(self, patch: Patch) -> None:
        assert patch.costs is not None
        self.costs, self.tokens, self.layout = patch.costs, patch.tokens, patch.layout
        self.method = patch.method.schedule
        # The last block has no tokens to leave that are read, or those that left are back in front of it.
        self.depth = patch.depth - (patch.prefix_only_last or patch.fuses)
        self.most = self.costs.total(self.tokens, {}) / self.costs.total(self.tokens)

    def own(self, model: nn.Module) -> Counts:
        [patch] = active_patches(model).values()
        assert isinstance(patch, Patch)
        counts = patch.counts(patch.tokens)
        return without_idle({block: counts[block] for block in counts if block < self.depth}, self.tokens)

    def solved(self, genes: Genes, aim: float) -> Counts:
        return at_cost(genes, self.method, aim, self.tokens, self.layout, self.costs)

    def genes(self, counts: Counts) -> Genes:
        return genes_of(counts, self.tokens, self.depth)

    def schedule(self, counts: Counts) -> dict[int | str, float]:
        return shares_of(counts, self.tokens)


class Windows:
    """Windows that the blocks of a model of windows compute, each of all of its own."""

    def __init__(self, patch: WindowsPatch) -> None:
        assert patch.costs is not None
        self.costs, self.grid, self.layouts = patch.costs, patch.usual, patch.layouts
        self.depth, self.most = len(patch.layouts), 1.0

    def own(self, model: nn.Module) -> Counts:
        [patch] = active_patches(model).values()
        assert isinstance(patch, WindowsPatch)
        return patch.plan(self.grid).keep

    def solved(self, genes: Genes, aim: float) -> Counts:
        def counts_at(strength: float, costs: WindowCosts, grid: Grid) -> Counts:
            power = 1.0 / strength - 1.0
            shares = ((index, (1.0 - gene) ** power) for index, gene in enumerate(genes) if gene > 0)
            return {index: max(1, round(share * costs.layouts[index].windows(grid))) for index, share in shares}

        return by_cost(Budget("flops", aim), self.costs, self.grid, counts_at).keep

    def genes(self, counts: Counts) -> Genes:
        windows = (layout.windows(self.grid) for layout in self.layouts)
        return tuple(1.0 - counts.get(index, count) / count for index, count in enumerate(windows))

    def schedule(self, counts: Counts) -> dict[int | str, float]:
        each = ((self.layouts[index], count) for index, count in sorted(counts.items()))
        # Rounded so that it gives the counts again.
        return {layout.number: math.floor(1e6 * count / layout.windows(self.grid)) / 1e6 for layout, count in each}
