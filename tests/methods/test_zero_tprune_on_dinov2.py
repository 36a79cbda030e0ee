"""Each part of Zero-TPrune acts on the attention of a really trained model."""

from __future__ import annotations

import pytest
from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.evals import mass_quality
from tokenprune.evals.dinov2 import dinov2_small, normalize
from tokenprune.evals.images import photographs
from tokenprune.registry import make_method
from tokenprune.scores.pagerank import fuse_heads, passing_heads, weighted_pagerank

DEPTH = 12


@pytest.fixture(scope="module")
def records() -> list[AttentionRecord]:
    """What every block of the unreduced model shows, for four photographs."""
    return mass_quality.records(dinov2_small(), normalize(photographs().images[::12][:4]))


def patch_scores(record: AttentionRecord, iterations: int) -> Tensor:
    return weighted_pagerank(record, iterations)[:, :, record.num_prefix_tokens :]


def published_rounds(block: int) -> int:
    return 30 if block < 3 else 1 if block >= 9 else 5


def kept(scores: Tensor) -> Tensor:
    """Which half of the tokens a score keeps, as a mask."""
    return scores >= scores.median(1, keepdim=True).values


def test_the_variance_filter_removes_some_heads_and_not_all(records: list[AttentionRecord]) -> None:
    partly = []
    for block, record in enumerate(records):
        scores = patch_scores(record, published_rounds(block))
        counted = passing_heads(scores, (0.01, 0.7)).float().mean((1, 2))
        removed = 1 - counted
        print(f"block {block}: the filter removes {removed.mean():.0%} of the heads, per image {removed.tolist()}")
        partly.append(bool(((removed > 0) & (removed < 1)).any()))
    assert sum(partly) >= 3


def test_head_fusion_changes_the_kept_set(records: list[AttentionRecord]) -> None:
    changed = [
        (kept(fuse_heads(s, passing_heads(s, None))) != kept(s.mean(1))).any().item()
        for s in (patch_scores(record, published_rounds(block)) for block, record in enumerate(records))
    ]
    assert sum(changed) >= DEPTH // 2


def test_thirty_iterations_differ_from_one(records: list[AttentionRecord]) -> None:
    for record in records[:3]:
        one, thirty = (fuse_heads(s, passing_heads(s, None)) for s in (patch_scores(record, i) for i in (1, 30)))
        assert (kept(one) != kept(thirty)).float().mean() > 0.02


def test_the_similarity_stage_removes_what_the_importance_stage_kept(records: list[AttentionRecord]) -> None:
    record = records[3]
    keep = record.tokens // 2
    importance_only = make_method("zero_tprune", {"similarity": 0}).reduce(record, keep).kept
    both = make_method("zero_tprune", {"similarity": 10}).reduce(record, keep).kept
    for alone, together in zip(importance_only.tolist(), both.tolist(), strict=True):
        assert set(alone) - set(together)
