"""Arms of adaptive methods at a budget: what `calibrate` finds, counted once for all budgets."""

from __future__ import annotations

import torch

import tokenprune
from tokenprune.calibration import Costs, threshold_at
from tokenprune.evals.calibrated_arms import Calibrated
from tokenprune.evals.commands import first_images
from tokenprune.evals.models import load_model


def test_several_budgets_share_what_is_counted() -> None:
    loaded = load_model("digits-vit")
    assert loaded.data is not None
    images = first_images(loaded.data(6, 0), 6, 0)
    forwards = list[int]()
    loaded.model.patch_embed.register_forward_hook(lambda *_: forwards.append(1))
    arms = Calibrated(loaded.model, images[:2], images, 6, dense=False)
    taken = []
    for method, flops in (("saint", 0.6), ("saint", 0.5), ("saint", 0.6), ("ltmp", 0.4), ("ltmp", 0.4)):
        forwards.clear()
        arm = arms.arm(method, {"flops": flops}, required=True)
        taken.append(len(forwards))
        assert arm.model is not None
        with torch.inference_mode():
            arm.model(images)
        assert abs(tokenprune.report(arm.model).to_dict()["flops_ratio"] - flops) <= 0.01
        if method == "saint":
            found = threshold_at(Costs(loaded.model, images, "saint", 6), flops, near=0.005)
            assert arm.note is not None
            assert f"threshold={found.options['threshold']:.4f}," in arm.note
    first, second, again, bounded, bounded_again = taken
    assert first > second > again
    assert again == 1  # the arm's own, on the example
    assert bounded > bounded_again == 0
