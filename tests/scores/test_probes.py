"""Pooled and sampled queries against loops over windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune import TokenPruneError
from tokenprune.attention_record import AttentionRecord
from tokenprune.kernels.attention_mass import attention_mass
from tokenprune.scores.probes import probed_mass

GRID, PREFIX, SCALE = (5, 7), 2, 0.3


def record(kept: Tensor | None = None, **changes: object) -> AttentionRecord:
    """Two images of 35 patches, or of those at `kept` [2, n]."""
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, 3, PREFIX + 35, 8, generator=generator) for _ in range(2))
    origin = torch.arange(35).expand(2, -1) if kept is None else kept
    rows = torch.cat([torch.arange(PREFIX).expand(2, -1), PREFIX + origin], 1)
    q, k = (torch.stack([image[:, own] for image, own in zip(x, rows, strict=True)]) for x in (q, k))
    fields = {"hidden": torch.zeros(2, q.shape[2], 8), "origin": origin, "num_prefix_tokens": PREFIX, "place": 0}
    return AttentionRecord(**{**fields, "depth": 12, "grid": GRID, "scale": SCALE, "queries": q, "keys": k, **changes})


def reduced() -> AttentionRecord:
    order = [torch.randperm(35, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return record(torch.stack([one[:19].sort().values for one in order]))


def start(one: AttentionRecord) -> Tensor:
    weights = torch.rand(2, 3, one.q.shape[2], generator=torch.Generator().manual_seed(5))
    return weights / weights.sum(-1, keepdim=True)


def naive(one: AttentionRecord, weights: Tensor, window: tuple[int, int], how: str, iterations: int) -> Tensor:
    out = torch.zeros_like(weights)
    for image in range(2):
        windows: dict[tuple[int, ...], list[int]] = {}
        for token in range(PREFIX):
            windows[(token,)] = [token]
        for n, patch in enumerate(one.origin[image].tolist()):
            row, column = divmod(patch, GRID[1])
            windows.setdefault((row // window[0], column // window[1]), []).append(PREFIX + n)
        for head in range(3):
            mass = weights[image, head]
            for _ in range(iterations):
                pushed = torch.zeros_like(mass)
                for members in windows.values():
                    q = one.q[image, head]
                    query = q[members].mean(0) if how == "pool" else q[middle(one, image, members, window)]
                    pushed += mass[members].sum() * (one.k[image, head] @ query * SCALE).softmax(0)
                mass = pushed
            out[image, head] = mass
    return out


def middle(one: AttentionRecord, image: int, members: list[int], window: tuple[int, int]) -> int:
    if members[0] < PREFIX:
        return members[0]

    def distance(token: int) -> float:
        row, column = divmod(int(one.origin[image, token - PREFIX]), GRID[1])
        return abs(row % window[0] - (window[0] - 1) / 2) + abs(column % window[1] - (window[1] - 1) / 2)

    return min(members, key=lambda token: (distance(token), token))


@pytest.mark.parametrize("one", [record(), reduced()], ids=["all", "reduced"])
@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 1), (9, 9)], ids=str)
@pytest.mark.parametrize("how", ["pool", "sample"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_formula(one: AttentionRecord, window: tuple[int, int], how: str, iterations: int) -> None:
    weights = start(one)
    mass = probed_mass(one, weights, window=window, how=how, iterations=iterations)
    torch.testing.assert_close(mass, naive(one, weights, window, how, iterations), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("how", ["pool", "sample"])
def test_windows_of_one_patch_are_exact(how: str) -> None:
    one = reduced()
    exact = attention_mass(one.q, one.k, start(one), scale=SCALE, iterations=5)
    torch.testing.assert_close(probed_mass(one, start(one), window=(1, 1), how=how, iterations=5), exact)
    assert (probed_mass(one, start(one), window=(2, 2), how=how) - exact).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"grid": None}, "fill no grid"), ({"bias": torch.zeros(1, 3, 37, 37)}, "attention bias")],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    one = record(**changes)
    with pytest.raises(TokenPruneError, match=message):
        probed_mass(one, start(one))
