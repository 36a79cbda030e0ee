"""PatchMerger: learned queries attend to the tokens (Renggli et al., "Learning to Merge Tokens in Vision Transformers",
2022, as in Haurum et al., "Which Tokens to Use?", 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenprune.learning import Learned, Recipe, Shape
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.selection.mixtures import mix, no_penalty

RATE = 1e-3


class Merger(nn.Module):
    """A query for each mixture."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.queries = nn.Parameter(torch.randn(shape.tokens, shape.width))

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """x [B, n, C] to weights [B, keep, n], of which each row sums to one: softmax(Q LN(x)^T), without a scale."""
        weights: Tensor = (self.queries[:keep] @ self.norm(x.to(self.queries.dtype)).transpose(1, 2)).softmax(-1)
        return weights


def rate(name: str, steps: int) -> float:
    """Peak learning rate: as published for a batch of 1,024."""
    return RATE


LEARNED = Learned(
    part=Merger,
    penalty=no_penalty,
    rate=rate,
    recipe=Recipe(epochs=30, batch_size=128, opt="adamw", weight_decay=0.05, smoothing=0.1),
    sized=True,
)


@register_method("patch_merger")
def patch_merger(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Replace the tokens behind a block by fewer mixtures of all of them, weighted by attention of learned queries.

    The tokens are mixed as they are, as the model's frozen blocks know them (the code of "Which Tokens to Use?" mixes
    the layer-normalised ones and trains the model). `tokenprune train MODEL --method patch_merger --flops 0.6` learns
    the queries for that number of tokens. rate: share of mixtures at each of `places`, behind the blocks in front of a
    quarter, a half and three quarters of the depth. Where all are kept, nothing is done.
    """
    return Method(
        name="patch_merger",
        paper="Renggli et al., Learning to Merge Tokens in Vision Transformers, 2022",
        schedule=InFrontOfStages(rate, places),
        select=mix,
        learned=LEARNED,
        position="post",
        merges=True,
    )
