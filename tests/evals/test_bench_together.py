"""Many arms that share two unpatched ones."""

from __future__ import annotations

import torch

from tokenprune.evals.arms import Arm, build_arms, filtered
from tokenprune.evals.bench import bench_together
from tokenprune.evals.models import load_model


def test_arms_that_differ_by_the_filter_alone_are_timed_once() -> None:
    model = load_model("digits-vit").model
    images = torch.randn(2, 3, 80, 80)
    arms = build_arms(model, images, ["top_k"], [{"flops": 0.6}])
    (smaller,) = (arm for arm in arms if arm.size is not None)
    arms = [*arms, filtered(smaller, "area"), Arm("none", "", None, note="not for this model")]
    calls = dict.fromkeys((arm.method for arm in arms if arm.model is not None), 0)
    for arm in arms:
        if arm.model is not None and arm.method != "smaller input, area":
            arm.model.patch_embed.register_forward_pre_hook(
                lambda *_, name=arm.method: calls.__setitem__(name, calls[name] + 1)
            )
    rows = {row["method"]: row for row in bench_together(arms, images, rounds=20).rows}
    assert calls["top_k"] == calls["random"] == calls["smaller input"] == 21
    timed = ("speedup", "speedup_low", "speedup_high", "control", "images_per_s")
    assert [rows["smaller input, area"][name] for name in timed] == [rows["smaller input"][name] for name in timed]
    assert rows["top_k"]["speedup"] != rows["random"]["speedup"]
    assert rows["none"].get("speedup") is None
    assert rows["none"]["note"] == "not for this model"
