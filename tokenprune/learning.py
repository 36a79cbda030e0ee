"""Learned: what a method says about its learned parts, and all that the trainer knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.schedule import Layout


def alone(x: Tensor) -> Tensor:
    """The mean over the processes of a training, of which there is one."""
    return x


@dataclass(frozen=True)
class Shape:
    """What a learned part may depend on. width: channels of a token. place: the block, of `depth`. tokens: how many
    leave the place, of a method that leaves the same number in every image, else 0. classes, labels: of what is
    trained alone, how many classes there are, and how many labels an image has: one, or as many as patches."""

    width: int
    place: int
    depth: int
    tokens: int = 0
    classes: int = 0
    labels: int = 1


@dataclass
class Lesson:
    """One training forward, as a method's loss sees it.

    tokens: of an image, prefix included, of which `prunable` can leave. width, depth: of the model. counted: {block:
    tokens leaving, as a mean} -> what such a forward costs as a share of the unpatched one, scoring included. across:
    the mean of a tensor over all processes. alive: block -> [B, prunable] masks behind it, as `Masking.alive`, of a
    method that masks. leaving: block -> tokens that are to leave it by the budget, of a method that leaves the same
    number in every image.

    Of a method without masks also: strength: share of what a budget removes that leaves in this forward. entered: block
    -> tokens [B, N, C] that entered the place, without gradients. labels: [B] classes, or maps of them [B, h, w].
    parts: what is trained, by block. grid: (rows, columns) of the patches.
    """

    tokens: int
    prunable: int
    width: int
    depth: int
    counted: Callable[[Mapping[int, float]], float]
    across: Callable[[Tensor], Tensor] = alone
    alive: dict[int, Tensor] = field(default_factory=dict)
    strength: float = 1.0
    entered: dict[int, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    parts: nn.ModuleDict | None = None
    grid: tuple[int, int] | None = None
    leaving: Mapping[int, int] = field(default_factory=dict)

    def left(self) -> Tensor | float:
        """Share of the prunable tokens behind the last place."""
        if self.alive:
            return self.alive[max(self.alive)].mean()
        return 1 - self.strength * (1 - self.leaving[max(self.leaving)] / self.prunable)

    def kept(self) -> list[Tensor]:
        """Share of the tokens, prefix included, behind each block: means over the images of all processes, with the
        gradient of this one's."""
        shares: list[Tensor] = []
        prefix = self.tokens - self.prunable
        for block in range(self.depth):
            if block in self.alive:
                own = (self.alive[block].sum(1).mean() + prefix) / self.tokens
                shares.append(own + (self.across(own.detach()) - own.detach()))
            else:
                shares.append(shares[-1] if shares else next(iter(self.alive.values())).new_ones(()))
        return shares

    def cost(self, kept: list[Tensor]) -> float:
        """What a forward with these shares costs, counted, as a share of the unpatched one."""
        prefix = self.tokens - self.prunable
        return self.counted({block: kept[block].item() * self.tokens - prefix for block in self.alive})


@dataclass(frozen=True)
class Recipe:
    """How a paper trains: names and values of timm's optimisers and schedulers. smoothing: of the labels.
    distill_logits, distill_tokens, model_rate: weights of what the unpatched model teaches, and the peak learning rate
    of the model's own weights, see `tokenprune.training.train`."""

    epochs: int
    batch_size: int
    opt: str = "momentum"
    momentum: float = 0.0
    weight_decay: float = 0.0
    sched: str = "cosine"
    smoothing: float = 0.0
    distill_logits: float = 0.0
    distill_tokens: float = 0.0
    model_rate: float = 0.0


@dataclass(frozen=True)
class Learned:
    """What a method learns while the model's own weights are frozen.

    part: (Shape) -> the learned part of one place, as it starts; scores and selections find it in
    `AttentionRecord.learned`. penalty: (lesson, share of the multiply-adds) -> what is added to the loss of the task;
    of a method for windows the lesson is a `tokenprune.windows.lesson.WindowLesson`.
    rate: (name of a parameter in a part, steps of the training) -> its peak learning rate. settle: done to each part
    after each step. weaken: (part, factor) changes a part so that it removes less below a factor of one, and more above
    it, by which the budget is met in the end; None where its counts are what it is. sized: whether a part is made for
    the number of tokens that leave its place (`Shape.tokens`); before that number is known it is made for all of them,
    to be counted, and is to work with the first ones that it is asked for. bound: whether what is learned is for the
    budget and the places of its training alone.

    Of a method without masks: curriculum: (share of the training that is done, whether each patch has a label) -> share
    of what the budget removes that leaves already, None for all of it. disturb: (record) -> hidden states [B, N, C]
    that go on in the place of the record's, with gradients. places: (layout) -> the blocks that learn, where these are
    not those at which tokens leave. trained: (Shape) -> what is trained in the place of `part`, with more in it than
    inference needs; strip: from that to the state of the part. detached: whether parts learn from the penalty alone,
    as the loss of the task, and so a teacher of its answers, gives them no gradient.
    """

    part: Callable[[Shape], nn.Module]
    penalty: Callable[[Any, float], Tensor | float]
    rate: Callable[[str, int], float]
    recipe: Recipe
    settle: Callable[[nn.Module], None] | None = None
    weaken: Callable[[nn.Module, float], None] | None = None
    sized: bool = False
    bound: bool = True
    curriculum: Callable[[float, bool], float] | None = None
    disturb: Callable[[AttentionRecord], Tensor] | None = None
    places: Callable[[Layout], tuple[int, ...]] | None = None
    trained: Callable[[Shape], nn.Module] | None = None
    strip: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    detached: bool = False
