"""Method: the recipe of a paper, out of a score, a selection, a reduction and a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.over_steps import OverSteps
from tokenprune.denoisers.steps import EVERY_STEP, Steps
from tokenprune.errors import UnsupportedMethod
from tokenprune.ragged import RaggedReduction
from tokenprune.reduction import Reduction
from tokenprune.schedule import Schedule

Score = Callable[[AttentionRecord], Tensor]
Select = Callable[[Tensor | None, AttentionRecord, int], Reduction | RaggedReduction]


@dataclass(frozen=True)
class Method:
    """A small immutable recipe; it knows tensors and no library.

    score: AttentionRecord -> importance [B, n] of the prunable tokens (None: the selection needs none).
    select: (scores, record, K) -> the Reduction to K tokens, or of an `adaptive` method the RaggedReduction to at most
    K, a number of its own for each image (a record then holds images of equal length). schedule: in which blocks, how
    much at each.
    position: "mid" reduces between attention and MLP, "post" after the block. merges: whether leaving tokens stand for
    several patches (sizes are tracked). proportional: whether log(size) is added to the attention logits of a key.
    needs: what must be captured ("queries", "keys", "values"; "stacks": that all tokens are back behind a few blocks).

    For denoisers: stack_share: share of the tokens that is computed in a stack of blocks where there is no budget.
    stack_depth: blocks that share one choice where a model does not divide them into stacks itself. steps: how strongly
    at each step of a run. recover: what a dropped token is behind a stack, a copy of the most "similar" kept one or its
    own value before ("residual"); None: the first where convolutions follow, else the second. over_steps: what is taken
    from an earlier step, None for a method that keeps nothing over steps.
    """

    name: str
    paper: str
    schedule: Schedule
    select: Select
    score: Score | None = None
    position: Literal["mid", "post"] = "mid"
    merges: bool = False
    proportional: bool = False
    adaptive: bool = False
    needs: frozenset[str] = frozenset()
    stack_share: float = 0.5
    stack_depth: int = 4
    steps: Steps = EVERY_STEP
    recover: Literal["similar", "residual"] | None = None
    over_steps: OverSteps | None = None

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
