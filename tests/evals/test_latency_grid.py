from __future__ import annotations

import itertools

import naive_pomt
import pytest
import torch
from families import build, images

import tokenprune
from tokenprune.evals.latency_grid import LatencyGrid, latency_grid


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_the_choice_is_that_of_the_oracle(alpha: float) -> None:
    tokens, latency, quality = (9, 6, 3), (1.0, 0.5, 0.25), (1.0, 0.9, 0.5)
    grid = LatencyGrid(tokens, latency, quality, alpha)
    assert grid.removed == 9 - naive_pomt.best_count(tokens, latency, quality, alpha)


def test_a_grid_of_a_model_by_a_clock_that_counts_calls() -> None:
    """Each reading of the clock is one later, so every forward takes as long, and quality alone decides."""
    model = build("class_token")
    x = images(model, 6)
    with torch.no_grad():
        answers = model(x).argmax(1)
    ticks = itertools.count()
    grid = latency_grid(model, x, answers, batch_size=2, stride=7, clock=lambda: float(next(ticks)))
    assert grid.tokens == (35, 28, 21, 14, 7)
    assert grid.latency == (1.0,) * 5
    assert grid.quality[0] == 1.0
    for count, quality in zip(grid.tokens[1:], grid.quality[1:], strict=True):
        tokenprune.patch(model, "random", tokens=count, places=(0,))
        with torch.no_grad():
            assert quality == (model(x).argmax(1) == answers).double().mean().item()
    tokenprune.unpatch(model)
    assert latency_grid(model, x, batch_size=2, stride=7, rounds=1).quality == grid.quality
    assert grid.removed == 35 - naive_pomt.best_count(grid.tokens, grid.latency, grid.quality, 0.5)


def test_what_was_found_is_taken_by_the_method_and_the_model_is_left_alone() -> None:
    model = build("class_token")
    x = images(model, 4)
    with torch.no_grad():
        plain = model(x)
        grid = latency_grid(model, x, stride=12, rounds=2, alpha=1.0)
        assert torch.equal(model(x), plain)
    assert grid.tokens == (35, 23, 11)
    assert max(grid.utility) == grid.utility[grid.tokens.index(35 - grid.removed)]
    tokenprune.patch(model, "pomt", r=12)
    assert tokenprune.report(model).to_dict()["places"][-1]["tokens_out"] == 23
    for wrong in ({"alpha": 2.0}, {"stride": 0}):
        with pytest.raises(tokenprune.TokenPruneError, match="alpha"):
            latency_grid(model, x, **wrong)
