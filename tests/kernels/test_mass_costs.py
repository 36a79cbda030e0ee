"""Memory and time of the attention mass against the naive path."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_inputs import attention_inputs

from tokenprune.evals.memory import peak_extra_memory
from tokenprune.evals.side_by_side import side_by_side
from tokenprune.kernels.attention_mass import attention_mass
from tokenprune.kernels.attention_mass.reference import attention_mass as naive

full = pytest.mark.full
LIMIT = 64 * 2**20  # bytes, the default on a CPU


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    torch.use_deterministic_algorithms(False)  # filling fresh memory with NaN takes time that is not the path's


def map_bytes(heads: int, tokens: int) -> int:
    return 4 * heads * tokens**2


@pytest.mark.parametrize("iterations", [1, 5, 30])
@pytest.mark.parametrize("tokens", [197, 257, 577, pytest.param(1025, marks=full)])
def test_memory_is_below_the_limit_where_the_map_is_not(tokens: int, iterations: int) -> None:
    images = -(-3 * LIMIT // map_bytes(6, tokens)) if tokens > 577 else 16
    inputs = attention_inputs(images, 6, tokens, 64)
    peak = peak_extra_memory(partial(attention_mass, *inputs, iterations=iterations))
    assert peak <= 1.1 * LIMIT


def test_one_iteration_takes_a_twentieth_of_the_naive_memory() -> None:
    inputs = attention_inputs(1, 2, 2048, 64)
    ours, theirs = (peak_extra_memory(partial(mass, *inputs)) for mass in (attention_mass, naive))
    assert theirs >= map_bytes(2, 2048)
    assert ours <= 0.05 * theirs


@full
@pytest.mark.parametrize(("iterations", "share", "slower"), [(1, 0.05, 1.4), (30, 1 / 8 + 0.05, 1.1)])
def test_4096_tokens(iterations: int, share: float, slower: float) -> None:
    inputs = attention_inputs(1, 8, 4096, 64)
    ways = {
        "ours": partial(attention_mass, *inputs, iterations=iterations),
        "naive": partial(naive, *inputs, iterations=iterations),
    }
    assert peak_extra_memory(ways["ours"]) <= share * map_bytes(8, 4096)
    assert side_by_side(ways, "naive").ratio("ours", "naive").low <= slower


@full
@pytest.mark.parametrize("iterations", [1, 5, 30])
@pytest.mark.parametrize("tokens", [197, 257, 577, 1025])
def test_pagerank_is_as_fast_as_the_naive_path(tokens: int, iterations: int) -> None:
    inputs = attention_inputs(4, 6, tokens, 64)
    ways = {
        "ours": partial(attention_mass, *inputs, iterations=iterations),
        "naive": partial(naive, *inputs, iterations=iterations),
    }
    assert side_by_side(ways, "naive").ratio("ours", "naive").low <= 1.05
