"""The thresholds and selectors that the package ships for its ViT."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.evals.models import load_model
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.learned_parts import load_learned, shipped_parts

NAME = "digits-vit-ltmp-0.6"
NUMBERS = {"ltmp": 20, "tnt": 4 * 96, "cropr": 2 * 96, "dynamicvit": 46_158}
SELECTORS = tuple(NUMBERS)[1:]


def test_it_works_out_of_the_box_on_the_model_that_it_is_of() -> None:
    loaded = load_model("digits-vit")
    assert loaded.unlabelled is not None
    x, _ = next(loaded.unlabelled(48, 7).batches(48))
    tokenprune.patch(loaded.model, "ltmp", flops=0.6)
    with torch.no_grad():
        loaded.model(x)
    told = tokenprune.report(loaded.model).to_dict()
    assert told["flops_ratio"] == pytest.approx(0.6, abs=0.04)  # of 48 images
    assert told["places"][-1]["most"] >= told["places"][-1]["fewest"] + 10
    with pytest.raises(tokenprune.UntrainedMethod, match=r"for this model there is flops=0\.6"):
        tokenprune.patch(loaded.model, "ltmp", flops=0.5)
    assert tokenprune.report(loaded.model).to_dict()["method"] == "ltmp"
    tokenprune.patch(digits_vit().bfloat16(), "ltmp", flops=0.6)
    with pytest.raises(tokenprune.UntrainedMethod, match="has to learn for this model first: tokenprune train"):
        tokenprune.patch(digits_vit(pretrained=False), "ltmp", flops=0.6)


@pytest.mark.parametrize("method", NUMBERS)
def test_what_is_shipped_says_what_it_is(method: str) -> None:
    name = f"digits-vit-{method}-0.6"
    assert name in shipped_parts()
    parts = load_learned(name)
    assert parts.method == method
    assert parts.found["flops"] == 0.6
    assert parts.found["flops_ratio"] == pytest.approx(0.6, abs=0.01)
    assert parts.found["data"] == "cluttered digits (train)"
    assert sum(tensor.numel() for tensor in parts.tensors.values()) == NUMBERS[method]


@pytest.mark.parametrize("method", SELECTORS)
def test_selectors_work_out_of_the_box_at_any_budget(method: str) -> None:
    """And keep what the answer needs: at half of the multiply-adds random tokens give 0.55 of the `val` scans."""
    loaded = load_model("digits-vit")
    assert loaded.unlabelled is not None
    x, y = next(loaded.unlabelled(96, 7).batches(96))
    for flops in (0.6, 0.5):
        tokenprune.patch(loaded.model, method, flops=flops, restore="regression")
        with torch.no_grad():
            assert (loaded.model(x).argmax(1) == y).float().mean() > 0.75
        assert tokenprune.report(loaded.model).to_dict()["flops_ratio"] == pytest.approx(flops, abs=0.01)


def test_shipped_parts_bring_the_options_of_their_training_and_the_callers_own_come_first() -> None:
    model = digits_vit()

    def blocks(**asked: object) -> list[str]:
        tokenprune.patch(model, "cropr", **asked)
        return [place["name"] for place in tokenprune.report(model).to_dict()["places"]]

    assert blocks(flops=0.6) == ["blocks.1", "blocks.2"]
    assert blocks(flops=0.6, places=(2,)) == ["blocks.2"]
    assert blocks(schedule={1: 0.5}) == ["blocks.1"]
    with pytest.raises(tokenprune.TokenPruneError, match="do not fit cropr in the blocks 5"):
        tokenprune.patch(model, "cropr", flops=0.6, places=(5,))
    tokenprune.patch(digits_vit(pretrained=False), "cropr", flops=1.0)  # nothing is to be known there


@pytest.mark.full
@pytest.mark.parametrize(("method", "other"), [("ltmp", "tome"), ("tnt", "top_k"), ("dynamicvit", "top_k")])
def test_it_is_as_accurate_as_the_best_fixed_method(method: str, other: str) -> None:
    """`tome`, and among those that drop `top_k`."""
    loaded = load_model("digits-vit")
    assert loaded.data is not None
    learned = tokenprune.patch(shared_copy(loaded.model), method, flops=0.6, restore="regression")
    differences = []
    with torch.no_grad():
        for seed in (101, 102, 103):
            for x, y in loaded.data(1000, seed).batches(250):
                ours = learned(x).argmax(1) == y
                spent = tokenprune.report(learned).to_dict()["flops_ratio"]
                with tokenprune.patched(loaded.model, other, flops=round(spent, 4)):
                    differences.append(ours.double() - (loaded.model(x).argmax(1) == y).double())
    assert bootstrap_mean(torch.cat(differences)).high >= 0.0
