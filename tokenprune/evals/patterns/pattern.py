"""Pattern: what one method did with each image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.errors import TokenPruneError, UnsupportedModel
from tokenprune.evals.patterns.clusters import merges


@dataclass(frozen=True)
class Pattern:
    """One method at one budget on I images of N patches; the unpatched model has a Pattern of its own.

    model: its name. grid: (rows, columns) of the patches. blocks: the model's number of them. stages: the blocks behind
    which `groups` and `features` are taken.

    depth: [I, N], how many blocks in a row from the first the token of each patch leaves; of a group it is the token
    that the others are merged into. groups: [I, S, N], for each patch the token that it is part of, -1 for none.
    features: class tokens [I, S, D], None where the model has none. right: [I], bool, whether the answer is that of the
    label, or where there are no labels that of the unpatched model; of maps of classes the share of places where it is
    the unpatched model's; None for a model without a classifier.
    """

    model: str
    method: str
    budget: str
    flops_ratio: float | None
    grid: tuple[int, int]
    blocks: int
    stages: tuple[int, ...]
    depth: Tensor
    groups: Tensor
    features: Tensor | None
    right: Tensor | None

    @property
    def label(self) -> str:
        """Method and budget."""
        return f"{self.method}, {self.budget}" if self.budget else self.method

    def kept(self, stage: int) -> Tensor:
        """Which patches still have a token of their own behind that stage: [I, N], bool."""
        return self.depth > self.stages[stage]

    @property
    def merges(self) -> bool:
        """Whether it makes groups, and does not only drop."""
        return bool(merges(self.groups).any())


def require_class_tokens(pattern: Pattern) -> Tensor:
    """The class tokens [I, S, D].

    Raises UnsupportedModel where the model has none.
    """
    if pattern.features is None:
        raise UnsupportedModel(
            f"{pattern.model or 'this model'} has no class token among its blocks' tokens, so that there are no class"
            " features to compare; kept sets, clusters and depth are compared without it"
        )
    return pattern.features


def require_same_images(first: Pattern, second: Pattern) -> None:
    """Raises TokenPruneError where places or images of the two are not the same ones."""
    if first.grid != second.grid:
        raise TokenPruneError(
            f"{first.model} has a grid of {first.grid[0]} x {first.grid[1]} patches and {second.model} one of"
            f" {second.grid[0]} x {second.grid[1]}: places cannot be compared; give the two the size of image at which"
            " their grids are equal (timm: img_size=, patch_size=)"
        )
    if len(first.depth) != len(second.depth):
        raise TokenPruneError(f"{len(first.depth)} images of {first.model} and {len(second.depth)} of {second.model}")
