"""The thresholds that the package ships for its ViT."""

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


def test_what_is_shipped_says_what_it_is() -> None:
    assert NAME in shipped_parts()
    parts = load_learned(NAME)
    assert parts.found["flops"] == 0.6
    assert parts.found["flops_ratio"] == pytest.approx(0.6, abs=0.01)
    assert parts.found["data"] == "cluttered digits (train)"
    assert sum(tensor.numel() for tensor in parts.tensors.values()) == 20


@pytest.mark.full
def test_it_is_as_accurate_as_the_best_fixed_method() -> None:
    loaded = load_model("digits-vit")
    assert loaded.data is not None
    learned = tokenprune.patch(shared_copy(loaded.model), "ltmp", flops=0.6)
    differences = []
    with torch.no_grad():
        for seed in (101, 102, 103):
            for x, y in loaded.data(1000, seed).batches(250):
                ours = learned(x).argmax(1) == y
                spent = tokenprune.report(learned).to_dict()["flops_ratio"]
                with tokenprune.patched(loaded.model, "tome", flops=round(spent, 4)):
                    differences.append(ours.double() - (loaded.model(x).argmax(1) == y).double())
    assert bootstrap_mean(torch.cat(differences)).high >= 0.0
