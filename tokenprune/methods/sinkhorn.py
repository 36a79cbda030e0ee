"""Sinkhorn: tokens transported to learned centres (Haurum et al., "Which Tokens to Use?", 2023, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.learning import Learned, Recipe, Shape
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.selection.mixtures import mix, no_penalty

EPSILON = 1.0
ITERATIONS = 3
RATE = 1e-3


class Centres(nn.Module):
    """A unit vector for each cluster."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.centres = nn.Parameter(F.normalize(torch.randn(shape.tokens, shape.width), dim=-1))

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """x [B, n, C] to weights [B, keep, n]: the `transport` of unit tokens to centres, its rows made averages."""
        unit = F.normalize(x.to(self.centres.dtype), dim=-1)
        plan = transport(self.centres[:keep] @ unit.transpose(1, 2))
        return plan / plan.sum(-1, keepdim=True)


def transport(similarity: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """exp(similarity / epsilon) [B, K, n] with its rows and then its columns scaled to sums of one, as often as
    `iterations` says: columns sum to one in the end, rows where that is possible."""
    logits = similarity / epsilon
    columns = torch.zeros_like(logits[:, :1])
    rows = torch.zeros_like(logits[:, :, :1])
    for _ in range(iterations):
        rows = -torch.logsumexp(logits + columns, 2, keepdim=True)
        columns = -torch.logsumexp(logits + rows, 1, keepdim=True)
    return (logits + rows + columns).exp()


@torch.no_grad()
def onto_sphere(part: nn.Module) -> None:
    """Centres stay of unit length."""
    assert isinstance(part, Centres)
    part.centres.copy_(F.normalize(part.centres, dim=-1))


def rate(name: str, steps: int) -> float:
    """Peak learning rate: as published for a batch of 1,024."""
    return RATE


LEARNED = Learned(
    part=Centres,
    penalty=no_penalty,
    rate=rate,
    recipe=Recipe(epochs=30, batch_size=128, opt="adamw", weight_decay=0.05, smoothing=0.1),
    settle=onto_sphere,
    sized=True,
)


@register_method("sinkhorn")
def sinkhorn(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Replace the tokens behind a block by fewer mixtures of all of them: an optimal transport to learned centres.

    The tokens are averaged as they are, as the model's frozen blocks know them (the published code sums unit tokens,
    and trains the model). `tokenprune train MODEL --method sinkhorn --flops 0.6` learns the centres for that number of
    tokens. rate: share of mixtures at each of `places`, behind the blocks in front of a quarter, a half and three
    quarters of the depth. Where all are kept, nothing is done.
    """
    return Method(
        name="sinkhorn",
        paper="Haurum et al., Which Tokens to Use?, 2023",
        schedule=InFrontOfStages(rate, places),
        select=mix,
        learned=LEARNED,
        position="post",
        merges=True,
    )
