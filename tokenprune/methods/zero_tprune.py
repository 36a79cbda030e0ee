"""Zero-TPrune: weighted PageRank on the attention graph, and a similarity stage (Wang et al., CVPR 2024)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenprune.errors import UnsupportedMethod
from tokenprune.lvlm.recipe import AfterTower, mean_keys
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Layout, Stages
from tokenprune.selection.importance import Feature, ImportanceAndSimilarity, Rounds
from tokenprune.selection.pairs import Partition

_PAPER = "Wang et al., Zero-TPrune, CVPR 2024"


@dataclass(frozen=True)
class EarlyBlocks(Stages):
    """Stages in every block of the first seven twelfths of the depth."""

    def places(self, layout: Layout) -> tuple[int, ...]:
        return super().places(layout) if self.at is not None else tuple(range(max(1, round(layout.depth * 7 / 12))))


@register_method("zero_tprune")
def zero_tprune(
    *,
    rate: float = 0.9,
    places: tuple[int, ...] | None = None,
    iterations: Rounds | Mapping[int, Rounds] | None = None,
    similarity: int | tuple[float, float] = (1.0, 0.75),
    variance: tuple[float, float] | None = (0.01, 0.7),
    class_start: bool = True,
    feature: Feature = "key",
    metric: str = "cosine",
    partition: Partition = "sequential_u",
    fusion: Literal["rms", "mean"] = "rms",
    seed: int = 0,
) -> Method:
    """Drop the tokens that matter least in a block's attention graph and those similar to better ones.

    The paper drops between blocks; dropping before the block's MLP, which works token by token, gives the same output
    for less.

    rate: share kept at each of `places`. iterations: of the PageRank, the same everywhere or {block: count} (the
    paper's by depth: 30, 5 and 1); a float such as 1e-3 goes on until a head's scores, which sum to one, change by less
    in all (at most 200 times, which is what a FLOPs budget counts; the host waits for the device after each).
    similarity: how many of the tokens removed at a place the similarity stage takes (all, where fewer are removed), or
    its share of them at the first block and from three quarters of the depth on. variance: bounds of the head filter,
    None for no filter. class_start: the class token starts with sqrt(N) times the weight of the others.

    Its other ablations (section 4.3): feature, what tokens are compared by, the mean over heads of "key", "query" or
    "value", or hidden states in front of the block, "x_pre", or behind it, "x" (tokens then leave behind the block).
    metric: "cosine", "dot", "euclidean", "manhattan", "minkowski_3" to "minkowski_5" or "chebyshev". partition: who is
    compared with whom, of the tokens in order of importance: candidates for removal are the less important half
    ("sequential_u"), the more important one ("sequential_i"), every second one ("alternate"), a half that is drawn by
    `seed` ("random"), or each is compared with all that are more important ("none"; what the paper does without a
    partition is not verified). fusion of heads: root mean square ("rms") or "mean".

    Behind the tower of a vision-language model the graph is that of the layer whose output is used. It is the last of
    those that run for the language model, and iterations and the similarity stage's part are those of the last block.

    The paper finds places, rates and the similarity stage's part by random search for each model, and prints them in
    part (10 tokens a stage in DeiT-S, with importance pruning growing with depth). The defaults here were found the
    same way on a DINOv2 and are the same for every model; `places=(1, 3, 6, 9), similarity=10` is near the print.
    """
    frozen = _by_block(iterations) if isinstance(iterations, Mapping) else iterations
    stage = ImportanceAndSimilarity(frozen, similarity, variance, class_start, feature, metric, partition, fusion, seed)
    of_keys = AfterTower(stage.after_tower, score=stage.importance_here, keys=mean_keys)
    return Method(
        name="zero_tprune" if class_start else "zero_tprune_uni",
        paper=_PAPER,
        schedule=EarlyBlocks(rate, places),
        select=stage,
        position="post" if feature == "x" else "mid",
        needs=stage.needs(),
        after_tower=of_keys if feature == "key" else None,
    )


def _by_block(iterations: Mapping[Any, Rounds]) -> tuple[tuple[int, Rounds], ...]:
    """In order; a file names blocks by text."""
    if not all(re.fullmatch("[0-9]+", str(block)) for block in iterations):
        raise UnsupportedMethod(f"iterations={dict(iterations)!r} must name blocks; for example iterations={{3: 30}}")
    return tuple(sorted((int(block), count) for block, count in iterations.items()))


@register_method("zero_tprune_uni")
def zero_tprune_uni(
    *,
    rate: float = 0.9,
    places: tuple[int, ...] | None = None,
    iterations: Rounds | Mapping[int, Rounds] | None = None,
    similarity: int | tuple[float, float] = (1.0, 0.75),
    variance: tuple[float, float] | None = (0.01, 0.7),
) -> Method:
    """Zero-TPrune with a uniform start of the PageRank (section 4, "Zero-TPrune-uni"); options as there, where the
    other ablations are."""
    return zero_tprune(
        rate=rate,
        places=places,
        iterations=iterations,
        similarity=similarity,
        variance=variance,
        class_start=False,
    )
