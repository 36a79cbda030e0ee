"""Method: the recipe of a paper, out of a score, a selection, a reduction and a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.over_steps import OverSteps
from tokenprune.denoisers.steps import EVERY_STEP, Steps
from tokenprune.errors import UnsupportedMethod
from tokenprune.learning import Learned, Recipe
from tokenprune.lvlm.recipe import AfterTower, InsideModel
from tokenprune.masking import Masking
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction
from tokenprune.schedule import Schedule

Score = Callable[[AttentionRecord], Tensor]
Recover = Literal["similar", "gain", "residual"]
Restore = Literal["unmerge", "regression", "feature", "place", "fusion"]
Select = Callable[[Tensor | None, AttentionRecord, int], Reduction | RaggedReduction]
Mask = Callable[[AttentionRecord, int], Masking]


# (tokens of the latents or None, distinct numbers of tokens of the model's stacks, largest first) -> {number: share}.
Levels = Callable[[int | None, Sequence[int]], Mapping[int, float]]

# Numbers of blocks in the stages -> share of the windows left out in each block.
WindowRatios = Callable[[Sequence[int]], tuple[float, ...]]

# Of windows: confidences [B, W] -> masks [B, W] of one and zero, with the gradient of what decided them.
WindowMask = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reuse:
    """For how many steps of a run what a stack's first block chose holds, in all of its blocks.

    select_every: steps after which tokens are chosen anew. weigh_every: steps after which `weigh` gives the same choice
    the weights of the tokens as they are then.
    """

    select_every: int
    weigh_every: int
    weigh: Callable[[Reduction, AttentionRecord], Reduction]

    def due(self, step: int) -> Literal["select", "weigh", "hold"]:
        """What is to be done at a step of a run, counted from 0."""
        if step % self.select_every == 0:
            return "select"
        return "weigh" if step % self.weigh_every == 0 else "hold"


@dataclass(frozen=True)
class Method:
    """A small immutable recipe; it knows tensors and no library.

    score: AttentionRecord -> importance [B, n] of the prunable tokens (None: the selection needs none).
    select: (scores, record, K) -> the Reduction to K tokens, or of an `adaptive` method the RaggedReduction to at most
    K, a number of its own for each image (a record then holds images of equal length). schedule: in which blocks, how
    much at each. padded: of an adaptive method, whether a record may hold images of several lengths, behind the last
    token of which are some that are none (`AttentionRecord.alive`), so that all are decided on at once; what becomes of
    those does not matter.
    position: "mid" reduces between attention and MLP, "post" after the block, "front" before it. merges: whether
    leaving tokens stand for several patches (sizes are tracked). drops: of a method that merges, (block, depth, tokens
    removed) -> how many of those it drops instead. proportional: whether log(size) is added to the attention logits of
    a key. restore: what stands for a token that left, where the full grid is read (see `tokenprune.restore`); None:
    "unmerge" of a method that merges, else "regression".
    needs: what must be captured ("queries", "keys", "values", "block_input": hidden states in front of the block,
    "cross": those of the cross-attention; "stacks": that all tokens are back behind a few blocks; "grid": that the
    tokens fill one; "windows": that attention stays in windows; "steps": that the model is run once for each step of a
    run; "first_block": that tokens may be missing in front of it; "mixer": that a model is a row of blocks, of which
    the first may see all tokens).
    training_only: whether it acts in training forwards alone, and leaves those in eval mode as they are.

    For denoisers: stack_share: share of the tokens that is computed in a stack of blocks where there is no budget.
    stack_depth: blocks that share one choice where a model does not divide them into stacks itself. steps: how strongly
    at each step of a run. recover: what a dropped token is behind a stack, a copy of the most "similar" kept one, its
    own value before and what that one has gained since ("gain"), or its own value alone ("residual"); None: the first
    where convolutions follow, else the last. similar_by: whether that is by hidden states or by the first block's
    attention map (which needs queries and keys). parts: of each block, what runs on fewer tokens where it is not the
    whole block ("attention", "cross", "mlp": on merged tokens, which are unmerged behind it; "keys": the attention's
    keys and values alone). levels: at which stacks, and which share of the tokens is computed there where there is no
    budget; None for all. mixer: share of a row's blocks, the first ones, that stay whole in front of one stack of all
    others. reuse: of a choice over steps. over_steps: what is taken from an earlier step, None for a method that
    computes all anew.

    For models whose attention stays in windows, of which whole ones are left out (score is then of tokens [B, n], a
    window's is the L2 norm of its tokens' or, by window_score, their mean, and select is given windows):
    window_ratios: (number of blocks in each stage) -> share of the windows left out in each block where there is no
    budget, None for stack_share in all. window_draw: the same, drawn anew for each training forward. window_mask: of a
    method that learns, which windows go on in training, in the place of the selection. window_nested: whether a stage
    computes only windows that the last stage before it with the same ones, at the same resolution, has computed.

    For vision-language models: after_tower: what is left out between the image tower and the language model.
    inside_model: what leaves between layers of the language model.

    learned: what it learns, None for a method that works on any model as it is. mask: (record, K) -> what becomes of
    each token, where some tokens are none any more (`AttentionRecord.alive`), with gradients: in training, in the place
    of score and selection. A method that learns without it is trained through its reduction. tuning: how the trainer
    trains the model's own weights under a method that acts in training forwards alone and learns nothing itself; None
    where that is left to a loop.
    """

    name: str
    paper: str
    schedule: Schedule
    select: Select
    score: Score | None = None
    position: Literal["front", "mid", "post"] = "mid"
    merges: bool = False
    drops: Callable[[int, int, int], int] | None = None
    proportional: bool = False
    restore: Restore | None = None
    adaptive: bool = False
    padded: bool = False
    needs: frozenset[str] = frozenset()
    training_only: bool = False
    stack_share: float = 0.5
    stack_depth: int = 4
    steps: Steps = EVERY_STEP
    recover: Recover | None = None
    similar_by: Literal["hidden", "attention"] = "hidden"
    parts: tuple[str, ...] = ()
    levels: Levels | None = None
    mixer: float = 0.0
    reuse: Reuse | None = None
    over_steps: OverSteps | None = None
    window_ratios: WindowRatios | None = None
    window_draw: WindowRatios | None = None
    window_score: Literal["norm", "mean"] = "norm"
    window_mask: WindowMask | None = None
    window_nested: bool = False
    after_tower: AfterTower | None = None
    inside_model: InsideModel | None = None
    learned: Learned | None = None
    mask: Mask | None = None
    tuning: Recipe | None = None

    @property
    def restoration(self) -> Restore:
        """`restore`, or what takes its place."""
        return self.restore or ("unmerge" if self.merges else "regression")

    def reduce(self, record: AttentionRecord, keep: int) -> Reduction:
        """The Reduction of the record's n prunable tokens to `keep`."""
        reduction = self._selected(record, keep)
        assert isinstance(reduction, Reduction)
        return reduction

    def reduce_ragged(self, record: AttentionRecord, keep: int) -> RaggedReduction:
        """The RaggedReduction of the record's n prunable tokens to at most `keep` in each image."""
        reduction = self._selected(record, keep)
        if not isinstance(reduction, RaggedReduction):
            raise UnsupportedMethod(f"{self.name} is adaptive, and its selection must return a RaggedReduction")
        return reduction

    def _selected(self, record: AttentionRecord, keep: int) -> Reduction | RaggedReduction:
        scores = self.score(record) if self.score is not None else None
        return self.select(scores, record, keep)


def refuse_recover(method: Method, name: str) -> None:
    """Raise UnsupportedMethod where the option was given for a model that is no denoiser. name: of its class."""
    if method.recover is not None and not method.needs & {"stacks", "steps", "mixer"}:
        raise UnsupportedMethod(
            f"recover= says what a token is behind a denoiser's stack, and {name} has none; leave it out (what stands"
            " for a token that left an image tower is restore=)"
        )


def checked_recover(recover: Recover | None) -> Recover | None:
    """The option, which is one of those of `Method.recover`.

    Raises:
        UnsupportedMethod: it is another.
    """
    if recover not in (None, "similar", "gain", "residual"):
        raise UnsupportedMethod(f"recover={recover!r}: use 'similar', 'gain' or 'residual'")
    return recover
