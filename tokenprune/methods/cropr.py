"""Token Cropr: selectors that learn by auxiliary tasks, whose heads vanish after training (Bergner, Lippert and
Mahendran, "Token Cropr: Faster ViTs for Quite a Few Tasks", CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import BudgetError, UnsupportedModel
from tokenprune.learning import Learned, Lesson, Recipe, Shape
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import EveryBlock, Layout
from tokenprune.selection.top_k import keep_top_k

RATE = 1e-3
MLP_RATIO = 4


class Selector(nn.Module):
    """What a block has learned: one query [C], the sum of those that were trained."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(shape.width))


class Cropr(nn.Module):
    """What a block trains: queries [M, C], one for an image's class or one for the label of each patch, which attend to
    the tokens with one head and without projections, an MLP and a head that classifies (section 3.2)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.queries = nn.Parameter(torch.empty(shape.labels, width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, shape.classes)
        nn.init.trunc_normal_(self.queries, std=width**-0.5)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def query(self) -> Tensor:
        """The sum of the queries, [C]."""
        return self.queries.sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, M, classes] from tokens x [B, N, C]."""
        weights = (self.queries @ x.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
        found = weights @ x
        logits: Tensor = self.head(self.head_norm(found + self.mlp(self.norm(found))))
        return logits


def relevance(record: AttentionRecord) -> Tensor:
    """The sum over queries of their products with each prunable token, before any softmax, [B, n]: one product of a
    matrix and a vector."""
    assert isinstance(record.learned, (Selector, Cropr))
    query = record.learned.query
    return (record.hidden @ query.to(record.hidden.dtype))[:, record.num_prefix_tokens :]


def auxiliary(lesson: Lesson, flops: float) -> Tensor:
    """Sum over places of the cross-entropy of what their queries have read from the tokens that entered, which take no
    gradient from it; of maps the label of each patch is that in its first corner."""
    labels = lesson.labels
    assert labels is not None
    assert lesson.parts is not None
    if labels.ndim > 1:
        if lesson.grid is None:
            raise UnsupportedModel("cropr learns a label for each patch, and the patches of this model fill no grid")
        labels = F.interpolate(labels[:, None].float(), lesson.grid, mode="nearest").long()
    losses = []
    for place, tokens in lesson.entered.items():
        logits = lesson.parts[str(place)](tokens).float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, labels.flatten()))
    return torch.stack(losses).sum()


def curriculum(progress: float, dense: bool) -> float:
    """Share of the tokens to be removed that leave: of a dense task rising over the first half of the training."""
    return min(1.0, 2 * progress) if dense else 1.0


def strip(part: nn.Module) -> Mapping[str, Tensor]:
    """All that is left of a trained module: its query."""
    assert isinstance(part, Cropr)
    return {"query": part.query}


@dataclass(frozen=True)
class BeforeTheLastTwo(EveryBlock):
    """The same number r of tokens removed behind every block but the last two, with a class token one more behind the
    first, until an eighth of them is left."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(max(1, layout.depth - 2)))

    def counts(self, strength: float, tokens: int, layout: Layout) -> tuple[int, ...]:
        least, places = self.fewest(tokens, layout), range(1, len(self.places(layout)) + 1)
        return tuple(max(least, tokens - round(strength * tokens * i)) for i in places)

    def default(self, tokens: int, layout: Layout) -> tuple[int, ...]:
        more = min(1, layout.num_prefix_tokens) if self.r else 0
        counts = [tokens - more - self.r * (i + 1) for i in range(len(self.places(layout)))]
        if counts[-1] < self.fewest(tokens, layout):
            raise BudgetError(
                f"r={self.r} cannot be removed behind {len(counts)} blocks: {tokens} tokens enter the first; use"
                f" r={(tokens - self.fewest(tokens, layout) - more) // len(counts)} or a budget such as flops=0.6"
            )
        return tuple(counts)

    def fewest(self, entering: int, layout: Layout) -> int:
        return max(1, entering // 8)


@register_method("cropr")
def cropr(*, r: int = 8, places: tuple[int, ...] | None = None) -> Method:
    """Drop the tokens that help least with the task, by a selector for each block; with last-layer fusion.

    `tokenprune train MODEL --method cropr --flops 0.6` learns the selectors: in training each block has queries that
    read the task's answer from the tokens that enter, and no gradient goes from there to the model, which is frozen
    here (the paper trains it as well). Afterwards their sum is left, a vector. Labels may be classes or maps of them
    (`tokenprune.train` with a model that puts out maps); of maps the number removed rises over the first half of the
    training. What is learned is used at any budget.

    r: tokens removed behind each of `places`, by default every block but the last two. All of them come back in front
    of the last block (restore="fusion", which a model that reads the class token alone may do without:
    restore="regression").
    """
    return Method(
        name="cropr",
        paper="Bergner et al., Token Cropr, CVPR 2025",
        schedule=BeforeTheLastTwo(r, places),
        score=relevance,
        select=keep_top_k,
        position="post",
        restore="fusion",
        learned=Learned(
            part=Selector,
            penalty=auxiliary,
            rate=_peak,
            recipe=Recipe(epochs=50, batch_size=128, opt="adamw", weight_decay=0.05),
            curriculum=curriculum,
            trained=Cropr,
            strip=strip,
            bound=False,
            detached=True,
        ),
    )


def _peak(name: str, steps: int) -> float:
    return RATE
