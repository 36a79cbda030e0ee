"""What a method does in a vision-language model; it knows tensors and no library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.reduction import Reduction


@dataclass(frozen=True)
class AfterTower:
    """Which visual tokens go on from the tower to the language model, chosen for each image.

    select: (scores [B, n] or None, record, K) -> the Reduction to K tokens, whose `kept` are the places they take. The
    record holds the features [B, n, C] as the language model would get them. score: record of the tower's layer ->
    importance [B, n] of its patches; keys: the same record -> what similarity is measured on, [B, n, d], which becomes
    `metric` of the record of features. Where a placeholder stands for several patches it has their mean. layer: which
    layer, -1 the last; None the one whose output the language model gets. start_layer: from which layer on up to that
    one the score is the mean over layers, None for that one alone; by_class_token: only where the tower has a class
    token, whose attention is one row of a layer's map. text: whether the record needs the embeddings of the prompt's
    text. merges: whether tokens are merged, which is done before the projector where a patch is a token. count: (scores
    of an image) -> how many it keeps where there is no budget. whole_rows: whether K is a number of whole rows.
    """

    select: Callable[[Tensor | None, AttentionRecord, int], Reduction]
    score: Callable[[AttentionRecord], Tensor] | None = None
    keys: Callable[[AttentionRecord], Tensor] | None = None
    layer: int | None = None
    start_layer: int | None = None
    by_class_token: bool = False
    text: bool = False
    merges: bool = False
    count: Callable[[Tensor], int] | None = None
    whole_rows: bool = False

    @property
    def looks_at_attention(self) -> bool:
        """Whether a layer of the tower is looked into."""
        return self.score is not None or self.keys is not None


def mean_keys(record: AttentionRecord) -> Tensor:
    """Keys of the patches, mean over heads [B, n, D]."""
    return record.metric


def joined_keys(record: AttentionRecord) -> Tensor:
    """Keys of the patches, heads side by side [B, n, H D]."""
    return record.k[:, :, record.num_prefix_tokens :].transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class InsideModel:
    """Which visual tokens leave the language model, stage by stage, by the attention of the prompt's last text token.

    places: (layers of the model) -> the layers before which tokens leave, in order. kept: (rate, stage, tokens entering
    it, N of the prompt) -> how many of the highest scores stay. rate: (share of N behind the last stage, N, of them on
    the uniform grid) -> that rate. scored: layer whose input is looked at, counted from a place (-1: the layer before).
    rotary: whether queries and keys are turned to their positions. softmax: over the "visual" keys, or "all". stride:
    of the rows and columns of each image whose tokens survive the first stage whatever their score, None for none.
    """

    places: Callable[[int], tuple[int, ...]]
    kept: Callable[[float, int, int, int], int]
    rate: Callable[[float, int, int], float]
    scored: int = -1
    rotary: bool = False
    softmax: str = "visual"
    stride: int | None = None
