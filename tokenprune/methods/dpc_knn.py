"""DPC-KNN: merge clusters around density peaks (Du et al., 2016; of tokens Zeng et al., "Not All Tokens Are Equal",
CVPR 2022, as in Haurum et al., "Which Tokens to Use?", 2023)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn.functional import layer_norm

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count
from tokenprune.method import Method
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.selection.clusters import density_peaks, merge_clusters


@register_method("dpc_knn")
def dpc_knn(
    *, rate: float = 0.7, neighbours: int = 5, normalize: bool = False, places: tuple[int, ...] | None = None
) -> Method:
    """Cluster the tokens behind a block around those that are dense and far from denser ones, and average each cluster
    with equal weights (the paper's learned weights need training).

    rate: share of clusters at each of `places`, behind the blocks in front of a quarter, a half and three quarters of
    the depth. neighbours: nearest tokens that a density looks at, the token itself among them. normalize: find the
    peaks among layer-normalised tokens. The published density is exp(- squared distance / C), which has a unit: in a
    model of large hidden states the rare tokens, often the object, have a density of nearly 0 and never are a peak.
    Where all are kept, nothing is done.
    """
    return Method(
        name="dpc_knn",
        paper="Zeng et al., Not All Tokens Are Equal, CVPR 2022",
        schedule=InFrontOfStages(rate, places),
        select=partial(
            merge_around_peaks,
            neighbours=checked_count("neighbours", neighbours, smallest=1, example=5),
            normalize=normalize,
        ),
        position="post",
        merges=True,
    )


def merge_around_peaks(
    scores: Tensor | None, record: AttentionRecord, keep: int, *, neighbours: int, normalize: bool
) -> Reduction:
    """Merge hidden states into `keep` clusters around their `density_peaks`."""
    x = record.hidden[:, record.num_prefix_tokens :]
    compared = layer_norm(x, x.shape[-1:]) if normalize else x
    return merge_clusters(x, density_peaks(compared, keep, neighbours))
