"""LLaVA-PruMerge: outliers of the class token's attention, each with its neighbours merged in (Shang et al., 2024)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.merge import gather
from tokenprune.lvlm.recipe import AfterTower, joined_keys
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_evenly, ranked

# Evenly spaced tokens of PruMerge+ for each outlier.
_BETWEEN = 3


@register_method("prumerge")
def prumerge(
    *, rate: float | None = None, neighbours: int = 32, spatial: bool = False, start_layer: int | None = None
) -> Method:
    """Keep the tokens that the class token attends to far more than to the others in the tower's last layer, add to
    each its most similar ones, and append one token that stands for the rest.

    rate: share kept, the appended token included; without a budget each image keeps its outliers (above the third
    quartile by one and a half times the distance of the quartiles) and that token. neighbours: how many of the others
    are added to a kept one, by the cosine of keys, weighted by the attention that they receive. spatial: PruMerge+, in
    which three evenly spaced tokens are kept for each that is kept by attention, also of the outliers where there is no
    budget. start_layer: the class token's attention is the mean over the tower's layers from this one (0 the first) to
    the last (Wang et al., VTC-CLS, 2024); None, as published, for the last alone.
    """
    checked_count("neighbours", neighbours, smallest=1, example=32)
    if start_layer is not None:
        checked_count("start_layer", start_layer, smallest=0, example=0)
    select = partial(kept_and_neighbours, neighbours=neighbours, spatial=spatial)
    return Method(
        name="prumerge",
        paper="Shang et al., LLaVA-PruMerge, 2024",
        schedule=Stages(1.0 if rate is None else rate),
        select=select,
        needs=frozenset({"language model", "class token"}),
        after_tower=AfterTower(
            select,
            score=class_attention_of_one_head,
            keys=joined_keys,
            layer=-1,
            start_layer=start_layer,
            merges=True,
            count=outliers_and_between if spatial else outliers,
        ),
    )


def class_attention_of_one_head(record: AttentionRecord) -> Tensor:
    """Attention that the class token pays each patch [B, n] where all heads are taken as one."""
    q, k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in record.rotated())
    return class_attention(q, k)[:, 0, record.num_prefix_tokens :]


def outliers(scores: Tensor) -> int:
    """How many scores [n] lie above the third quartile by more than 1.5 times the distance of the quartiles, and one
    more token for the rest."""
    lower, upper = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device))
    return min(len(scores), int((scores > upper + 1.5 * (upper - lower)).sum()) + 1)


def outliers_and_between(scores: Tensor) -> int:
    """How many tokens PruMerge+ keeps of scores [n]: `outliers`, and three more for each."""
    return min(len(scores), 1 + (1 + _BETWEEN) * (outliers(scores) - 1))


def kept_and_neighbours(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, neighbours: int, spatial: bool = False
) -> Reduction:
    """`keep` tokens: the `keep` - 1 highest scores [B, n], each with the weighted sum of its nearest others added, and
    the weighted sum of the rest, in the place of the highest of them. All tokens stay as they are. spatial: of these
    `keep` - 1 three quarters are evenly spaced ones; where these have the highest scores themselves, the next highest
    are kept."""
    assert scores is not None
    if keep == record.tokens:
        return Reduction(record.origin)
    order = ranked(_spread(scores, record, keep - 1) if spatial else scores)
    kept, rest = order[:, : keep - 1].sort(dim=1).values, order[:, keep - 1 :]
    unit = functional.normalize(record.metric.float(), dim=-1)
    similarity = (gather(unit, kept) @ unit.transpose(1, 2)).scatter(2, kept.unsqueeze(2), float("-inf"))
    nearest = similarity.topk(min(neighbours, record.tokens - 1), dim=2).indices
    near = torch.zeros_like(similarity).scatter(2, nearest, 1.0) * scores.unsqueeze(1)
    matrix = near.scatter(2, kept.unsqueeze(2), 1.0)
    others = torch.zeros_like(scores).scatter(1, rest, gather(scores, rest)).unsqueeze(1)
    return Reduction(torch.cat([kept, rest[:, :1]], 1), matrix=torch.cat([matrix, others], 1))


def _spread(scores: Tensor, record: AttentionRecord, keep: int) -> Tensor:
    """Scores in [0, 1], raised so that first the highest and then evenly spaced ones are among the `keep` highest."""
    highest = round(keep / (1 + _BETWEEN))
    raised = scores.scatter(1, keep_evenly(scores, record, keep - highest).kept, 2.0)
    first = ranked(scores)[:, :highest]
    return raised.scatter(1, first, 3.0)
