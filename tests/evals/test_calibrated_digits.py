"""On the shipped ViT each image's own number of tokens beats a fixed one, at equal FLOPs in the mean."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from tokenprune.evals.fidelity import agreement
from tokenprune.evals.models import load_model
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import bootstrap_mean


@pytest.mark.full
def test_calibrated_thresholds_beat_a_fixed_number() -> None:
    loaded = load_model("digits-vit")
    assert loaded.unlabelled is not None
    assert loaded.data is not None
    calibration, _ = next(loaded.unlabelled(100, 5).batches(100))
    adaptive = tokenprune.patch(
        shared_copy(loaded.model), schedule=tokenprune.calibrate(loaded.model, calibration, flops=0.45)
    )
    differences = []
    with torch.no_grad():
        for seed in (101, 102, 103):
            x, _ = next(loaded.data(300, seed).batches(300))
            plain, ours = loaded.model(x), agreement(adaptive(x), loaded.model(x))
            spent = tokenprune.report(adaptive).to_dict()["flops_ratio"]
            with tokenprune.patched(loaded.model, "tome", flops=spent):
                differences.append(ours.double() - agreement(loaded.model(x), plain).double())
    gain = bootstrap_mean(torch.cat(differences))
    assert gain.low > 0.0, gain
