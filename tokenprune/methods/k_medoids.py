"""K-Medoids: keep the medoids of clusters of tokens (Marin et al., "Token Pooling in Vision Transformers", WACV 2023,
as in Haurum et al., "Which Tokens to Use?", 2023)."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count
from tokenprune.kernels.attention_mass import MAX_ITERATIONS
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.scores.attention import attention_received
from tokenprune.selection.clusters import medoids


@register_method("k_medoids")
def k_medoids(*, rate: float = 0.7, iterations: int = 3, places: tuple[int, ...] | None = None) -> Method:
    """Cluster the tokens behind a block and keep the medoid of each cluster, as it is.

    Tokens weigh as much as the attention that they receive in the block; those of most weight are the first medoids.
    The medoid has the least sum of distances to the members of its cluster, times their weights; the published code of
    "Which Tokens to Use?" sums over all tokens of the image there, and weighs the medoid instead of the members.

    rate: share kept at each of `places`, behind the blocks in front of a quarter, a half and three quarters of the
    depth. iterations: of assigning and choosing. Where all are kept, nothing is done.
    """
    return Method(
        name="k_medoids",
        paper="Marin et al., Token Pooling in Vision Transformers, WACV 2023",
        schedule=InFrontOfStages(rate, places),
        score=attention_received,
        select=partial(
            keep_medoids,
            iterations=checked_count("iterations", iterations, smallest=0, example=3, largest=MAX_ITERATIONS),
        ),
        position="post",
        needs=frozenset({"queries", "keys"}),
    )


def keep_medoids(scores: Tensor | None, record: AttentionRecord, keep: int, *, iterations: int) -> Reduction:
    """Keep `keep` `medoids` of hidden states, weighted by the scores [B, n]."""
    assert scores is not None
    return Reduction(medoids(record.hidden[:, record.num_prefix_tokens :], scores, keep, iterations))
