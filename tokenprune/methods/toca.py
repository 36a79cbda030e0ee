"""ToCa: token-wise feature caching (Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching",
ICLR 2025)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.denoisers.over_steps import Level, Memory, OverSteps
from tokenprune.errors import UnsupportedMethod
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.pagerank import weighted_pagerank
from tokenprune.selection.top_k import keep_top_k


@register_method("toca")
def toca(*, rate: float = 0.175, interval: int = 3, staleness: float = 0.25, bonus: float = 0.6) -> Method:
    """Compute everything every `interval` steps; at those between, take every attention's output from the last of them
    and compute the MLP of the tokens that matter most, of the others an earlier MLP output stands.

    A token matters by the attention that it receives (the column sum of the mean map over heads, at the last dense
    step, of length one over the tokens), by how long it has been left out, and by being the highest of its 2 x 2
    window. More tokens are computed late in the run and deep in the model.

    rate: share of tokens whose MLP is computed, the mean over blocks and steps (0.07 in the paper's class-conditional
    setting, times 2.5 because attention computes none). staleness: weight of the steps since a token was computed, in
    intervals. bonus: what the highest of a window gains, in shares of its score.
    """
    if interval < 2 or interval != int(interval):
        raise UnsupportedMethod(f"interval is a number of steps of at least 2, got {interval!r}")
    return Method(
        name="toca",
        paper="Zou et al., ToCa, ICLR 2025",
        schedule=Stages(rate),
        select=keep_top_k,
        needs=frozenset({"steps", "queries", "keys"}),
        stack_share=rate,
        stack_depth=1,
        recover="residual",
        over_steps=OverSteps(
            reuses="mlp",
            dense=partial(_dense, interval=interval),
            score=partial(importance, interval=interval, staleness=staleness, bonus=bonus),
            count=fresh_tokens,
            observe=attention_columns,
        ),
    )


def _dense(step: int, steps: int, interval: int) -> bool:
    return step % interval == 0


def fresh_tokens(level: Level) -> int:
    """share * N * (4 p - 1) * (0.8 + 0.4 l / (L - 1)) tokens at position p of the run, in block l of L."""
    depth = level.place / max(1, level.places - 1)
    share = level.share * (4.0 * level.position - 1.0) * (0.8 + 0.4 * depth)
    return int(min(max(share, 0.0), 1.0) * level.tokens)


def attention_columns(record: AttentionRecord) -> Tensor:
    """Attention that each token receives, the mean over heads, of length one: [B, N]."""
    return functional.normalize(weighted_pagerank(record, 1, class_start=False).mean(1), dim=-1)


def importance(record: AttentionRecord, memory: Memory, interval: int, staleness: float, bonus: float) -> Tensor:
    """Score of each token [B, N]: (attention received + staleness * steps / interval), more for a window's highest."""
    assert memory.observed is not None
    scores = memory.observed + staleness * memory.stale / interval
    if record.grid is None:
        return scores
    plane = scores.view(-1, 1, *record.grid)
    _, places = functional.max_pool2d(plane, 2, 2, ceil_mode=True, return_indices=True)
    gain = torch.zeros_like(scores).scatter(1, places.flatten(1), bonus)
    return scores * (1.0 + gain)
