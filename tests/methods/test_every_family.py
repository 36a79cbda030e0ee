"""Every method on every family of hosts: budgets met, outputs of full size, tokens accounted for, nothing left."""

from __future__ import annotations

import pytest
import torch
import zoo
from adaptive import RAGGED
from families import FAMILIES, METHODS, build, full_but, images, options, run

import tokenprune
from tokenprune.errors import TokenPruneError, UnsupportedMethod

ADAPTIVE = ("ats", "saint", "algm")
ONE = ("class_token",)


@pytest.mark.parametrize("family", full_but(ONE, FAMILIES))
@pytest.mark.parametrize("method", METHODS)
def test_of_a_fixed_number(family: str, method: str) -> None:
    model = build(family)
    x = images(model)
    plain, features = run(model, x), model.forward_features(x)
    if (family, method) == ("talking_heads", "pomt"):  # CaiT exposes no values
        with pytest.raises(UnsupportedMethod, match="values"):
            tokenprune.patch(model, method, keep=0.6)
        return
    tokenprune.patch(model, method, keep=1.0, **options(family, method))
    assert torch.equal(run(model, x), plain)
    one = x[:1]  # relative position tables are computed once in a forward, whatever its batch
    before = zoo.count(model, one).get_total_flops()
    tokenprune.patch(model, method, flops=0.75, **options(family, method))
    report = tokenprune.report(model).to_dict()
    assert report["flops_ratio"] == pytest.approx(0.75, abs=0.02)  # of 35 tokens one is about that
    assert zoo.count(model, one).get_total_flops() / before == pytest.approx(report["flops_ratio"], abs=0.002)
    with tokenprune.record(model) as recording:
        reduced = run(model, x)
    assert reduced.isfinite().all()
    assert not torch.equal(reduced, plain)
    assert model.forward_features(x).shape == features.shape
    for place, told in zip(recording.forwards[0].places, report["places"], strict=False):
        left = place.kept.shape[1]
        assert place.source.max() == left - 1
        assert place.name in {place["name"] for place in report["places"]}
        assert told["tokens_out"] <= told["tokens_in"]
    assert torch.equal(run(tokenprune.unpatch(model), x), plain)


@pytest.mark.parametrize("family", full_but((), FAMILIES))
@pytest.mark.parametrize("method", ADAPTIVE)
def test_of_a_number_for_each_image(family: str, method: str) -> None:
    model = build(family)
    x = images(model, 3)
    plain, features = run(model, x), model.forward_features(x)
    if family not in RAGGED:
        with pytest.raises(TokenPruneError):
            tokenprune.patch(model, method, keep=0.6)
        return
    tokenprune.patch(model, method, keep=1.0)
    assert torch.equal(run(model, x), plain)
    tokenprune.patch(model, method, keep=0.6)
    with tokenprune.record(model) as recording:
        reduced = run(model, x)
    assert reduced.isfinite().all()
    assert all((image >= 0).sum() <= 21 for image in recording.forwards[0].places[-1].kept)
    assert model.forward_features(x).shape == features.shape
    assert torch.equal(run(tokenprune.unpatch(model), x), plain)
