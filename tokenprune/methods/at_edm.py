"""AT-EDM: attention-driven pruning of denoisers (Wang et al., "Attention-Driven Training-Free Efficiency Enhancement of
Diffusion Models", CVPR 2024)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_count
from tokenprune.denoisers.steps import PRUNE_LESS
from tokenprune.errors import UnsupportedMethod
from tokenprune.kernels.attention_mass import MAX_ITERATIONS
from tokenprune.method import Method, Recover, checked_recover
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.cross_pagerank import cross_pagerank
from tokenprune.scores.pagerank import fuse_heads, weighted_pagerank
from tokenprune.selection.top_k import keep_top_k


def graph_score(record: AttentionRecord, iterations: int) -> Tensor:
    """Importance of each token [B, n]: weighted PageRank on each head's self-attention graph from a uniform start
    (section 3.2, SA-WPR), fused over heads."""
    scores = weighted_pagerank(record, iterations, class_start=False)[:, :, record.num_prefix_tokens :]
    return fuse_heads(scores)


def text_graph_score(record: AttentionRecord, iterations: int) -> Tensor:
    """The same on the graph between image and text tokens (CA-WPR)."""
    assert record.cross is not None
    scores = cross_pagerank(record.cross, iterations)
    return fuse_heads(scores)


@register_method("at_edm")
def at_edm(
    *,
    rate: float = 0.37,
    iterations: int = 1,
    attention: Literal["self", "cross"] = "self",
    recover: Recover | None = None,
    similar_by: Literal["attention", "hidden"] = "attention",
) -> Method:
    """Compute only the tokens that matter in a stack's attention graph; the others skip its remaining blocks whole.

    Scored in the first block of each stack, or before a stack of one block; behind the stack a token left out is a
    copy of the most similar one computed where convolutions follow, and keeps its own value where none do. For the
    first 30% of the steps the stacks at the edges of the stages (of a transformer the first and the last) are whole
    (denoising-steps-aware pruning).

    rate: share of the tokens computed in a stack (the paper removes 63%). iterations: of the PageRank; the paper runs
    it until it settles and gives no number. attention: which graph it runs on, image tokens among themselves, or image
    and text tokens, these weighted by how focused the attention is that they receive (the paper found the first
    better). recover: what a token left out is behind the stack, a copy of the most similar one computed ("similar"),
    its own value and what that one gained in the stack's blocks ("gain", not in the paper), or its own value
    ("residual"); None for the first where convolutions follow, else the last. similar_by: what is similar, by the mean
    over heads of the first block's attention map, as in the paper, or by hidden states.
    """
    if attention not in ("self", "cross"):
        raise UnsupportedMethod(f"attention={attention!r}: use 'self' or 'cross'")
    if similar_by not in ("attention", "hidden"):
        raise UnsupportedMethod(f"similar_by={similar_by!r}: use 'attention' or 'hidden'")
    counted = checked_count("iterations", iterations, smallest=1, example=1, largest=MAX_ITERATIONS)
    needs = {"stacks", "cross"} if attention == "cross" else {"stacks", "queries", "keys"}
    if similar_by == "attention" and recover != "residual":
        needs |= {"queries", "keys"}
    return Method(
        name="at_edm",
        paper="Wang et al., AT-EDM, CVPR 2024",
        schedule=Stages(rate),
        score=partial(graph_score if attention == "self" else text_graph_score, iterations=counted),
        select=keep_top_k,
        needs=frozenset(needs),
        stack_share=rate,
        steps=PRUNE_LESS,
        recover=checked_recover(recover),
        similar_by=similar_by,
    )
