"""Zero-TPrune's iterations as a count, by block and as a tolerance."""

from __future__ import annotations

import pytest
import torch
from families import build, images, run
from torch import Tensor

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.registry import make_method


@pytest.fixture(scope="module")
def record() -> AttentionRecord:
    generator = torch.Generator().manual_seed(3)
    q, k = (2 * torch.randn(2, 3, 37, 16, generator=generator) for _ in range(2))
    origin = torch.arange(36).expand(2, -1)
    return AttentionRecord(torch.randn(2, 37, 48), origin, 1, 0, 12, (6, 6), scale=0.25, queries=q, keys=k)


def kept(record: AttentionRecord, **options: object) -> Tensor:
    return make_method("zero_tprune", options).reduce(record, 17).kept


@pytest.mark.parametrize("similarity", [0, 5, 19])
def test_a_tight_tolerance_is_very_many_iterations(record: AttentionRecord, similarity: int) -> None:
    settled = kept(record, iterations=1e-6, similarity=similarity)
    assert torch.equal(settled, kept(record, iterations=150, similarity=similarity))
    assert torch.equal(settled, kept(record, iterations={0: 1e-6}, similarity=similarity))
    if similarity < 19:  # else the first stage takes them all
        assert not torch.equal(settled, kept(record, iterations=1, similarity=similarity))


def test_a_tolerance_of_one_is_no_count_of_one(record: AttentionRecord) -> None:
    # The mass of a head sums to one, so its first change is below 2 and may be above 1e-1.
    assert not torch.equal(kept(record, iterations=1e-1, similarity=5), kept(record, iterations=1, similarity=5))


def test_a_patched_model_takes_a_tolerance() -> None:
    model = tokenprune.patch(build("class_token"), "zero_tprune", keep=0.5, iterations=1e-4)
    exact = tokenprune.patch(build("class_token"), "zero_tprune", keep=0.5, iterations=100)
    x = images(model)
    torch.testing.assert_close(run(model, x), run(exact, x), rtol=1e-4, atol=1e-4)


def test_a_tolerance_of_nothing_is_refused(record: AttentionRecord) -> None:
    with pytest.raises(tokenprune.TokenPruneError, match="a tolerance in"):
        kept(record, iterations=0.0)
