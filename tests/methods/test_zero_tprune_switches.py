"""Zero-TPrune's ablation switches: feature, metric, partition, start, fusion and filter, each against the oracle."""

from __future__ import annotations

import functools
from typing import Any

import naive_vit
import pytest
import tiny_models
import torch
from compared import assert_same, clear_oracle, recorded
from naive_zero_tprune import zero_tprune
from torch import nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.pairwise import METRICS
from tokenprune.selection.importance import ImportanceAndSimilarity

SHARES = {2: 0.7, 6: 0.7}
ROUNDS = {2: 3, 6: 2}
SWITCHES: list[dict[str, Any]] = [
    *({"feature": feature} for feature in ("query", "value", "x_pre", "x")),
    *({"metric": metric} for metric in METRICS if metric != "cosine"),
    *({"partition": partition} for partition in ("sequential_i", "alternate", "none")),
    {"fusion": "mean"},
    {"feature": "x_pre", "metric": "euclidean", "partition": "none", "fusion": "mean"},
]
FAST = [SWITCHES[i] for i in (2, 3, 6, 12, 13, 15)]  # x_pre, x, manhattan, alternate, none, several at once
CASES = [
    pytest.param(variant, switch, marks=[] if variant == "registers" and switch in FAST else pytest.mark.full)
    for variant in ("registers", "class_token", "mean_pool", "rotary")
    for switch in SWITCHES
]


def kept(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    tokenprune.patch(model, "zero_tprune", schedule=SHARES, iterations=ROUNDS, similarity=4, **options)
    return recorded(model, x)[1]


@pytest.mark.parametrize(("variant", "switch"), CASES, ids=str)
def test_agrees_with_the_oracle(variant: str, switch: dict[str, Any]) -> None:
    model = tiny_models.build(variant)
    schedule = {block: naive_vit.leaving_share(share) for block, share in SHARES.items()}
    reduce = functools.partial(zero_tprune, iterations=ROUNDS, similarity=4, **switch)
    x, oracle = clear_oracle(model, reduce, schedule, seeds=40, after_block=True)
    tokenprune.patch(model, "zero_tprune", schedule=SHARES, iterations=ROUNDS, similarity=4, **switch)
    logits, passages = recorded(model, x)
    assert_same(logits, passages, oracle)
    assert kept(model, x) != passages


def test_start_and_filter_are_options_too() -> None:
    model, x = tiny_models.build("class_token"), tiny_models.images()
    found = [kept(model, x, **switch) for switch in ({}, {"class_start": False}, {"variance": None})]
    tokenprune.patch(model, "zero_tprune_uni", schedule=SHARES, iterations=ROUNDS, similarity=4)
    assert recorded(model, x)[1] == found[1]
    assert found[1] != found[0] != found[2]


def test_a_random_partition_is_drawn_by_a_seed() -> None:
    model, x = tiny_models.build("registers"), tiny_models.images()
    state = torch.get_rng_state()
    first = kept(model, x, partition="random")
    assert kept(model, x, partition="random") == first
    assert [kept(model, x[i : i + 1], partition="random")[0] for i in range(3)] == first
    assert any(kept(model, x, partition="random", seed=seed) != first for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    # The same tokens are candidates whatever the image is: with all of one half to go, that half goes.
    stage = ImportanceAndSimilarity(1, 17, None, True, partition="random")
    record = AttentionRecord(
        torch.randn(2, 36, 8), torch.arange(35).expand(2, -1), 1, 0, 12, (7, 5), keys=torch.randn(2, 1, 36, 8)
    )
    gone = stage.similar(torch.rand(2, 35), record, 17)
    assert len(set(gone[0].tolist())) == 17
    assert set(gone[0].tolist()) == set(gone[1].tolist())


def test_what_tokens_enter_a_block_is_known_when_it_is_run_once_more() -> None:
    """Under gradient checkpointing too."""
    model = tiny_models.build("class_token").train()
    tokenprune.patch(model, "zero_tprune", schedule=SHARES, iterations=2, similarity=4, feature="x_pre")
    x, found = tiny_models.images(), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append(model.blocks[1].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


def test_what_is_refused() -> None:
    model = tiny_models.build("class_token")
    for name in ("feature", "metric", "partition", "fusion"):
        with pytest.raises(tokenprune.UnsupportedMethod, match=f"{name}='hamming' is none of"):
            tokenprune.patch(model, "zero_tprune", **{name: "hamming"})
    for iterations in ((1,), (0.5, 0.5), ("a", "b"), {"a": 1}, {3: "x", "a": 1}, {3: "x"}, {3: 0}):
        with pytest.raises(tokenprune.UnsupportedMethod, match="iterations"):
            tokenprune.patch(model, "zero_tprune", iterations=iterations)
    with pytest.raises(tokenprune.UnsupportedMethod, match="entered the block"):
        _ = AttentionRecord(torch.randn(1, 2, 3), torch.zeros(1, 1).long(), 1, 0, 1, None).block_input
