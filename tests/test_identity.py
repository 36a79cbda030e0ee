"""Promise 1: keeping every token is the unpatched model, also with the whole machinery running."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FEW, build, images, options, run

import tokenprune
from tokenprune.taps import Taps

# ToMe leaves in an order of its own.
IN_ORDER = [(family, method) for family in FAMILIES for method in ("top_k", "zero_tprune")] + [
    (family, method) for family in FEW for method in ("random", "uniform", "evit", "zero_tprune_uni")
]


def everywhere(model: torch.nn.Module) -> dict[int, float]:
    """A schedule that runs every place and keeps every token."""
    return dict.fromkeys(range(len(model.blocks)), 1.0)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks in which a reduction really ran."""
    blocks: list[int] = []
    plain = Taps.record

    def noting(self: Taps, *args: torch.Tensor) -> object:
        blocks.append(self.index)
        return plain(self, *args)

    monkeypatch.setattr(Taps, "record", noting)
    return blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_of_one_is_bit_identical(family: str) -> None:
    model = build(family)
    x = images(model)
    plain = run(model, x)
    for budget in ({"keep": 1.0}, {"flops": 1.0}):
        tokenprune.patch(model, "top_k", **budget)
        assert torch.equal(run(model, x), plain)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == 1.0


@pytest.mark.parametrize(("family", "method"), IN_ORDER)
def test_machinery_that_keeps_all_is_bit_identical(family: str, method: str, reduced: list[int]) -> None:
    model = build(family)
    x = images(model)
    plain, features = run(model, x), model.forward_features(x)
    tokenprune.patch(model, method, schedule=everywhere(model))
    reduced.clear()
    assert torch.equal(run(model, x), plain)
    assert reduced == list(range(len(model.blocks)))
    assert torch.equal(model.forward_features(x), features)


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_and_restored_order(family: str, reduced: list[int]) -> None:
    """ToMe's leaving order is the even tokens, then the odd ones, so everything indexed by token must follow."""
    model = build(family).double()
    x = images(model).double()
    plain, features = run(model, x), model.forward_features(x)
    tokenprune.patch(model, "tome", schedule=everywhere(model), **options(family, "tome"))
    reduced.clear()
    torch.testing.assert_close(run(model, x), plain, rtol=1e-6, atol=1e-6)
    assert reduced == list(range(len(model.blocks)))
    torch.testing.assert_close(model.forward_features(x), features, rtol=1e-6, atol=1e-6)
    with tokenprune.record(model) as recording:
        run(model, x)
    assert not torch.equal(recording.forwards[0].places[-1].kept[0], torch.arange(35))
