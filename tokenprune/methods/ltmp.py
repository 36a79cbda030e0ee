"""LTMP: a merge and a prune threshold for each block, learned in one epoch (Bonnaerens and Dambre, "Learned Thresholds
Token Merging and Pruning for Vision Transformers", TMLR 2023)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.learning import Learned, Lesson, Recipe, Shape
from tokenprune.masking import Masking, masked_away, straight_through
from tokenprune.method import Method
from tokenprune.ordering import order_of
from tokenprune.registry import register_method
from tokenprune.schedule import InEveryBlock
from tokenprune.scores.attention import attention_received
from tokenprune.selection.pairs import alternating, alternating_match
from tokenprune.selection.top_k import first_of

TEMPERATURE = 0.1
PENALTY = 10.0
MERGE_START, PRUNE_START = 0.9, 0.0
MERGE_RATE, PRUNE_RATE = 5e-3, 5e-6
LEAST_PRUNED = 1e-4
"""A prune threshold below which hardly a token is: importance is one over the number of tokens in the mean."""
PUBLISHED_STEPS = 10009
"""An epoch of ImageNet-1k in batches of 128, for which these rates are published."""


class Thresholds(nn.Module):
    """What a block learns: the cosine from which on a pair is merged, and the importance up to which a token goes.

    prunes: whether the second is above zero, as loaded; importance is positive, and where nothing can be below the
    threshold it need not be known.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.merge = nn.Parameter(torch.tensor(MERGE_START))
        self.prune = nn.Parameter(torch.tensor(PRUNE_START))
        self.prunes = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.prunes = bool(self.prune > 0)


def every_second(record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions [B, M] and [B, n - M] of ToMe's sets A and B among the tokens that are there, and which of these
    positions are really theirs."""
    first = record.num_prefix_tokens % 2
    if record.alive is None:
        a, b = alternating(record, first)
        return a, b, torch.ones_like(a, dtype=torch.bool), torch.ones_like(b, dtype=torch.bool)
    alive = record.alive > 0
    in_a = alive & ((alive.cumsum(1) - 1) % 2 == first)
    sides = []
    for side in (in_a, alive & ~in_a):
        order = order_of(side.byte(), descending=True)[:, : (record.tokens + 1) // 2]
        sides.append((order, gather(side, order)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def _match(record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `alternating_match`, of the tokens that are there."""
    a, b, real_a, real_b = every_second(record)
    metric = record.metric
    similarity, match = cosine_match(gather(metric, a) * real_a[..., None], gather(metric, b) * real_b[..., None])
    return a, b, similarity.masked_fill(~real_a, float("-inf")), match


def _packed_match(record: AttentionRecord) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return alternating_match(record.metric, record, record.num_prefix_tokens % 2)


def merge_and_prune(record: AttentionRecord, keep: int, *, packed: bool = False) -> Masking:
    """Merge the pairs of ToMe whose cosine is above the block's merge threshold, then drop the groups whose largest
    importance is not above its prune threshold (section 3.3); of more than `keep` the least important go as well.

    An image of which nothing would be left keeps its first token. packed: what is no token is behind an image's last,
    and not among its tokens.
    """
    thresholds = record.learned
    assert isinstance(thresholds, Thresholds)
    own = torch.arange(record.tokens, device=record.origin.device).expand_as(record.origin)
    unmerged, target = record.hidden.new_ones(own.shape, dtype=torch.float32), own
    if record.tokens > 1:
        a, b, similarity, match = _packed_match(record) if packed else _match(record)
        goes = straight_through(similarity.clamp_min(0.0), thresholds.merge, TEMPERATURE) * (similarity > float("-inf"))
        unmerged, partner = unmerged.to(goes.dtype).scatter(1, a, 1 - goes), gather(b, match)
        target = own.scatter(1, a, torch.where(goes > 0, partner, a))
    if not (thresholds.prunes or thresholds.prune.requires_grad or keep < record.tokens):
        return Masking(unmerged, target)
    scores = attention_received(record)
    there = torch.ones_like(scores) if record.alive is None else record.alive.to(scores.dtype)
    if record.tokens > 1:
        shared = torch.where(goes > 0, gather(scores, a), 0.0)
        scores = scores.scatter_reduce(1, partner, shared, "amax")
    stays = unmerged * straight_through(scores, thresholds.prune, TEMPERATURE)
    stays = torch.where(there > 0, stays, 1.0)  # what left before has the gradient of what decided it there
    left = (there > 0) & (stays > 0)
    if keep < record.tokens:
        best = first_of(scores.detach().masked_fill(~left, float("-inf")), torch.full_like(own[:, :1], keep))
        stays, left = stays * best, left & best
    first = (own == (there > 0).byte().argmax(1, keepdim=True)) & ~left.any(1, keepdim=True)
    return Masking(stays + (1 - stays).detach() * first, torch.where(first, own, target))


def flops_ratio(kept: list[Tensor], tokens: int, width: int) -> Tensor:
    """Share of the multiply-adds of the blocks where `kept` [depth] is the share of the tokens behind each: attention
    at what entered a block, the MLP at what left its thresholds (section 3.4, as in the authors' code)."""
    whole = 6 * tokens * width**2 + tokens**2 * width
    total, before = torch.zeros_like(kept[0]), torch.ones_like(kept[0])
    for after in kept:
        n, m = before * tokens, after * tokens
        total, before = total + (2 * n * width**2 + n**2 * width + 4 * m * width**2) / whole, after
    return total / len(kept)


def off_budget(lesson: Lesson, flops: float) -> Tensor:
    """PENALTY (r - flops)^2 with r the counted share of the multiply-adds, and with the gradient of `flops_ratio`,
    which counts neither scoring nor what is in front of the blocks and behind them."""
    kept = lesson.kept()
    ratio = flops_ratio(kept, lesson.tokens, lesson.width)
    return PENALTY * (ratio + (lesson.cost(kept) - ratio.detach()) - flops) ** 2


def rate(name: str, steps: int) -> float:
    """Peak learning rate of a threshold in a training of so many steps: as published for merging, which soon gets where
    it is to be; for pruning more in a short training, in which thresholds would hardly leave zero otherwise."""
    return MERGE_RATE if name == "merge" else PRUNE_RATE * max(1.0, PUBLISHED_STEPS / steps) ** 0.5


@torch.no_grad()
def weaken(thresholds: nn.Module, factor: float) -> None:
    """How far each threshold is from that at which nothing goes, times a factor; below LEAST_PRUNED a block is spared
    the importance."""
    assert isinstance(thresholds, Thresholds)
    thresholds.merge.copy_(1 - factor * (1 - thresholds.merge))
    thresholds.prune.mul_(factor)
    if thresholds.prune < LEAST_PRUNED:
        thresholds.prune.zero_()


@torch.no_grad()
def into_range(thresholds: nn.Module) -> None:
    """Thresholds stay in [0, 1]."""
    for threshold in thresholds.parameters():
        threshold.clamp_(0, 1)


LEARNED = Learned(
    part=Thresholds,
    penalty=off_budget,
    rate=rate,
    recipe=Recipe(epochs=1, batch_size=128, smoothing=0.1),
    settle=into_range,
    weaken=weaken,
)


@register_method("ltmp")
def ltmp(*, rate: float = 1.0, proportional: bool = True, places: tuple[int, ...] | None = None) -> Method:
    """Merge what is similar and drop what is unimportant by thresholds that each block has learned: a different number
    in each image.

    `tokenprune train MODEL --method ltmp --flops 0.6` learns them in an epoch with the model frozen; flops= names the
    budget that they were learned for. rate: the most that stay at a place as a share of those at the place before; 1.0,
    the paper's, sets no bound. keep= and tokens= bound what the last leaves. proportional: add log(size) to the
    attention logits of a merged token. places: the blocks, all by default.
    """
    return Method(
        name="ltmp",
        paper="Bonnaerens and Dambre, Learned Thresholds Token Merging and Pruning, TMLR 2023",
        schedule=InEveryBlock(rate, places),
        select=partial(masked_away, mask=partial(merge_and_prune, packed=True)),
        mask=merge_and_prune,
        learned=LEARNED,
        merges=True,
        proportional=proportional,
        adaptive=True,
        padded=True,
        needs=frozenset({"queries", "keys"}),
    )
