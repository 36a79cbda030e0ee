"""VisionZip: dominant tokens and contextual ones into which the others are merged (Yang et al., CVPR 2025)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count, checked_share
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather
from tokenprune.lvlm.recipe import AfterTower, mean_keys
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import ranked


@register_method("visionzip")
def visionzip(*, rate: float = 1 / 9, contextual: float = 10 / 64, start_layer: int | None = None) -> Method:
    """Keep the tokens that the class token attends to most (without one, that receive most), and merge the others by
    the cosine of keys into evenly spaced ones among them.

    rate: share kept (64 of 576). contextual: share of the kept ones that others are merged into (10 of 64).
    start_layer: the class token's attention is the mean over the tower's layers from this one (0 the first) to the one
    whose output is used (Wang et al., VTC-CLS, 2024); None, as published, for that one alone. The published code keeps
    the class token as one of the dominant ones; here its place goes to one more of the image.
    """
    if start_layer is not None:
        checked_count("start_layer", start_layer, smallest=0, example=0)
    return Method(
        name="visionzip",
        paper="Yang et al., VisionZip, CVPR 2025",
        schedule=Stages(rate),
        select=partial(dominant_and_contextual, share=contextual),
        needs=frozenset({"language model", *(["class token"] if start_layer is not None else [])}),
        after_tower=AfterTower(
            partial(dominant_and_contextual, share=checked_share("contextual", contextual)),
            score=attention_to_class,
            keys=mean_keys,
            start_layer=start_layer,
            merges=True,
        ),
    )


def dominant_and_contextual(scores: Tensor | None, record: AttentionRecord, keep: int, *, share: float) -> Reduction:
    """`keep` tokens: the highest scores [B, n], then targets at even steps among the rest. A target is the sum of
    itself and the mean of those of the rest that are most similar to it."""
    assert scores is not None
    targets = min(keep - 1, max(1, round(share * keep)))
    order = ranked(scores)
    dominant = order[:, : keep - targets].sort(dim=1).values
    rest = order[:, keep - targets :].sort(dim=1).values
    if targets == 0 or rest.shape[1] == targets:
        return Reduction(torch.cat([dominant, rest[:, :targets]], 1))
    step = rest.shape[1] // targets
    places = torch.arange(rest.shape[1], device=rest.device)
    is_target = (places % step == 0) & (places < step * targets)
    target, other = rest[:, is_target], rest[:, ~is_target]
    _, match = cosine_match(gather(record.metric, other), gather(record.metric, target))
    kept = torch.cat([dominant, target], 1)
    matrix = torch.zeros(*kept.shape, record.tokens, device=kept.device)
    matrix.scatter_(2, kept.unsqueeze(2), 1.0)
    joined = torch.zeros(*target.shape, record.tokens, device=kept.device)
    batch = torch.arange(len(kept), device=kept.device)[:, None]
    joined[batch, match, other] = 1.0
    matrix[:, dominant.shape[1] :] += joined / joined.sum(2, keepdim=True).clamp(min=1)
    return Reduction(kept, matrix=matrix)
