"""Learned: what a method says about its learned parts, and all that the trainer knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.schedule import Layout


def alone(x: Tensor) -> Tensor:
    """The mean over the processes of a training, of which there is one."""
    return x


@dataclass(frozen=True)
class Shape:
    """What a learned part may depend on. width: channels of a token. place: the block, of `depth`. Of what is trained
    also classes, how many there are, and labels, how many an image has: one, or as many as patches."""

    width: int
    place: int
    depth: int
    classes: int = 0
    labels: int = 1


@dataclass
class Lesson:
    """One training forward, as a method's loss sees it.

    tokens: of an image, prefix included, of which `prunable` can leave. width, depth: of the model. counted: {block:
    tokens leaving, as a mean} -> what such a forward costs as a share of the unpatched one, scoring included. across:
    the mean of a tensor over all processes. alive: block -> [B, prunable] masks behind it, as `Masking.alive`.

    Of a method without masks: strength: share of the tokens that a budget removes that leave in this forward. entered:
    block -> tokens [B, N, C] that entered the place, without gradients. labels: [B] classes, or [B, h, w]. parts: what
    is trained, by block. grid: (rows, columns) of the patches.
    """

    tokens: int
    prunable: int
    width: int
    depth: int
    counted: Callable[[Mapping[int, float]], float]
    across: Callable[[Tensor], Tensor] = alone
    alive: dict[int, Tensor] = field(default_factory=dict)
    strength: float = 0.0
    entered: dict[int, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    parts: nn.ModuleDict | None = None
    grid: tuple[int, int] | None = None

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
    """How a paper trains: names and values of timm's optimisers and schedulers. smoothing: of the labels."""

    epochs: int
    batch_size: int
    opt: str = "momentum"
    momentum: float = 0.0
    weight_decay: float = 0.0
    sched: str = "cosine"
    smoothing: float = 0.0


@dataclass(frozen=True)
class Learned:
    """What a method learns while the model's own weights are frozen.

    part: (Shape) -> the learned part of one place, before it has learned anything and without a random number; scores
    and selections find it in `AttentionRecord.learned`. penalty: (lesson, share of the multiply-adds) -> what is added
    to the loss of the task, None for nothing. rate: (name of a parameter in a part, steps of the training) -> its peak
    learning rate. settle: done to each part after each step. weaken: (part, factor) changes a part so that it removes
    less below a factor of one, and more above it, by which the budget is met in the end; None where its counts are what
    it is, or the budget's.

    Of a method without masks, in whose training forwards tokens really leave by the budget or none does: curriculum:
    (share of the training that is done, whether each patch has a label) -> share of the tokens to be removed that leave
    already; None for none. disturb: (record, x [B, N, C]) -> what goes on in the place of x, with gradients. places:
    (layout) -> the blocks that learn, None for those where tokens leave.

    trained: (Shape) -> what is trained in the place of `part`, with what is not needed afterwards; strip: from that to
    the state of the part. bound: whether what is learned is for the budget and the places of its training alone.
    """

    part: Callable[[Shape], nn.Module]
    penalty: Callable[[Lesson, float], Tensor] | None
    rate: Callable[[str, int], float]
    recipe: Recipe
    settle: Callable[[nn.Module], None] | None = None
    weaken: Callable[[nn.Module, float], None] | None = None
    curriculum: Callable[[float, bool], float] | None = None
    disturb: Callable[[AttentionRecord, Tensor], Tensor] | None = None
    places: Callable[[Layout], tuple[int, ...]] | None = None
    trained: Callable[[Shape], nn.Module] | None = None
    strip: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
    bound: bool = True
