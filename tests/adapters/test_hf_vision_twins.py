"""A transformers tower and the timm model with its weights: the same method keeps the same tokens and gives the same
output, and both agree with the oracle."""

from __future__ import annotations

import hf_twins
import naive_methods
import naive_vit
import pytest
import tiny_models
import torch
from hf_twins import PAIRS
from torch import Tensor, nn

import tokenprune
from tokenprune.recording import PlaceRecord

METHODS = (
    "top_k",
    "tome",
    *(pytest.param(method, marks=pytest.mark.full) for method in ("evit", "zero_tprune", "ats")),
)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module]:
    return (request.param, *hf_twins.build(request.param))


def test_the_twins_are_twins(pair: tuple[str, nn.Module, nn.Module]) -> None:
    kind, original, twin = pair
    x = hf_twins.images(kind)
    with torch.no_grad():
        torch.testing.assert_close(hf_twins.features(twin, x), original.forward_features(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_and_the_same_output(pair: tuple[str, nn.Module, nn.Module], method: str) -> None:
    kind, original, twin = pair
    x = hf_twins.images(kind)
    found: list[tuple[Tensor, list[PlaceRecord]]] = []
    for model in (original, twin):
        with tokenprune.patched(model, method, keep=0.5), tokenprune.record(model) as recording, torch.no_grad():
            features = original.forward_features(x) if model is original else hf_twins.features(twin, x)
        found.append((features, recording.forwards[0].places))
    for mine, other in zip(found[1][1], found[0][1], strict=True):
        assert torch.equal(mine.kept, other.kept)
        assert torch.equal(mine.source, other.source)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_vit_agrees_with_the_oracle(method: str) -> None:
    original, twin = hf_twins.build("vit")
    shares, x = {0: 0.7, 1: 0.75, 3: 0.6}, tiny_models.images()
    reduce = naive_methods.top_k if method == "top_k" else naive_methods.tome
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    oracle = naive_vit.run(original, x, reduce, schedule, proportional=method == "tome")
    assert oracle.margin > 1e-6
    tokenprune.patch(twin, method, schedule=dict(shares))
    with torch.no_grad(), tokenprune.record(twin) as recording:
        logits = twin(x.double()).logits
    for place, block in zip(recording.forwards[0].places, shares, strict=True):
        for image, source in enumerate(place.source.tolist()):
            assert source == oracle.passages[image][block].source
    torch.testing.assert_close(logits, oracle.logits, rtol=1e-4, atol=1e-4)
