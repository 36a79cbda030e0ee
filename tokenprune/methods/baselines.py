"""The baselines that every method must beat: `random` and `uniform`."""

from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.lvlm.recipe import AfterTower
from tokenprune.method import Method, Recover, checked_recover
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.fixed import hashed_scores
from tokenprune.selection.top_k import keep_evenly, keep_top_k


@register_method("random")
def random(
    *, rate: float = 0.7, places: tuple[int, ...] | None = None, seed: int = 0, recover: Recover | None = None
) -> Method:
    """Drop tokens at random, the same ones for every image. seed: which; rate: share kept at each of `places`. recover:
    what a dropped token is behind a denoiser's stack, see `Method`."""
    return Method(
        name="random",
        paper="baseline",
        schedule=Stages(rate, places),
        score=partial(hashed_scores, seed=seed),
        select=keep_top_k,
        stack_share=rate,
        recover=checked_recover(recover),
        after_tower=AfterTower(partial(_keep_hashed, seed=seed)),
    )


@register_method("uniform")
def uniform(*, rate: float = 0.7, places: tuple[int, ...] | None = None, recover: Recover | None = None) -> Method:
    """Keep evenly spaced tokens. rate: share kept at each of `places`. recover: what a dropped token is behind a
    denoiser's stack, see `Method`."""
    return Method(
        name="uniform",
        paper="baseline",
        schedule=Stages(rate, places),
        select=keep_evenly,
        stack_share=rate,
        recover=checked_recover(recover),
        after_tower=AfterTower(keep_evenly),
    )


def _keep_hashed(scores: Tensor | None, record: AttentionRecord, keep: int, seed: int) -> Reduction:
    return keep_top_k(hashed_scores(record, seed), record, keep)
