"""Candidates of a search for schedules: how they are drawn, changed and brought to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenprune.budget import Budget
from tokenprune.costs import CostModel
from tokenprune.schedule import Layout, Schedule
from tokenprune.solver import Counts, solve

Genes = tuple[float, ...]
"""For each block how much is removed there relative to the others, in [0, 1); 0 where nothing is."""

LEVELS = 10
MUTATION = 0.1
"""Probability with which a gene is drawn anew (Chen et al., SparseViT, CVPR 2023)."""


@dataclass(frozen=True)
class Profile:
    """Genes as a schedule: a share of (1 - gene) ** power leaves each block, at a power that meets the budget."""

    option: ClassVar[str] = "genes"

    genes: Genes
    method: Schedule

    def places(self, layout: Layout) -> tuple[int, ...]:
        return tuple(block for block, gene in enumerate(self.genes) if gene > 0)

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        power = strength / max(1e-9, 1.0 - strength)
        counts = []
        for block in self.places(layout):
            tokens = max(self.fewest(tokens, layout), round(tokens * (1.0 - self.genes[block]) ** power))
            counts.append(tokens)
        return tuple(counts)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        return self.counts(0.5, tokens, layout)

    def fewest(self, entering: int, layout: Layout) -> int:
        return self.method.fewest(entering, layout)


def at_cost(genes: Genes, method: Schedule, flops: float, tokens: int, layout: Layout, costs: CostModel) -> Counts:
    """Tokens leaving each place, of those where some are removed, at a share `flops` of the multiply-adds.

    Raises:
        BudgetError: these places cannot reach it.
    """
    counts = solve(Budget("flops", flops), Profile(genes, method), tokens, layout, costs)
    return without_idle(counts, tokens)


def without_idle(counts: Counts, tokens: int) -> Counts:
    """`counts` without the places that every token leaves which enters them."""
    kept: Counts = {}
    for block, count in sorted(counts.items()):
        if count < tokens:
            kept[block] = tokens = count
    return kept


def genes_of(counts: Counts, tokens: int, depth: int) -> Genes:
    """Genes that give `counts` at a power of one."""
    genes = [0.0] * depth
    for block, count in sorted(without_idle(counts, tokens).items()):
        genes[block] = 1.0 - count / tokens
        tokens = count
    return tuple(genes)


def drawn(depth: int, generator: torch.Generator) -> Genes:
    """Genes at random: of a number of blocks that is drawn first, so that few places are as likely as many."""
    count = 1 + _integer(depth, generator)
    chosen = set(torch.randperm(depth, generator=generator)[:count].tolist())
    return tuple(_level(generator) if block in chosen else 0.0 for block in range(depth))


def mutated(genes: Genes, generator: torch.Generator) -> Genes:
    """`genes` of which each is drawn anew with probability MUTATION, and at least one."""
    forced = _integer(len(genes), generator)
    changed = []
    for block, gene in enumerate(genes):
        again = float(torch.rand(1, generator=generator)) < MUTATION or block == forced
        changed.append(_maybe(generator) if again else gene)
    return tuple(changed)


def crossed(one: Genes, other: Genes, generator: torch.Generator) -> Genes:
    """Each gene from one of two parents."""
    choice = torch.rand(len(one), generator=generator).tolist()
    return tuple(a if draw < 0.5 else b for a, b, draw in zip(one, other, choice, strict=True))


def picked(parents: Sequence[Genes], generator: torch.Generator) -> Genes:
    """One of `parents`."""
    return parents[_integer(len(parents), generator)]


def _integer(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (1,), generator=generator))


def _level(generator: torch.Generator) -> float:
    return (1 + _integer(LEVELS - 1, generator)) / LEVELS


def _maybe(generator: torch.Generator) -> float:
    """A level, or as likely none."""
    return 0.0 if _integer(2, generator) else _level(generator)
