"""What is learned beside other methods: scores, ratios and paired differences."""

from __future__ import annotations

import pytest
import torch

from tokenprune.evals.digit_masks import overlaps
from tokenprune.evals.learned_quality import TASKS, compare
from tokenprune.evals.models import load_model
from tokenprune.evals.segmentation import mean_iou
from tokenprune.training.distillation import Distillation
from tokenprune.training.session import start_of


@pytest.mark.parametrize(("name", "flops"), [("digits-vit", 0.6), ("digit-masks", 0.5)])
def test_rows(name: str, flops: float, tmp_path: object) -> None:
    model, task = load_model(name).model, TASKS[name]
    parts = start_of(model, "cropr", flops, 0, Distillation(), 0.0, {})
    parts.save(f"{tmp_path}/start")
    rows = compare(task, model, [f"{tmp_path}/start"], flops=flops, samples=4, rule={})
    assert [row["method"] for row in rows] == ["unpatched", "top_k", "random", f"{tmp_path}/start"]
    assert [row["flops_ratio"] for row in rows[1:]] == pytest.approx([flops] * 3, abs=0.005)
    score = rows[3][task.name]
    for row, other in zip(rows[:3], ("unpatched", "top_k", "random"), strict=True):
        assert rows[3][f"over_{other}"] == pytest.approx(score - row[task.name])
    images, labels = (torch.cat(both) for both in zip(*(task.draw(4, seed) for seed in (101, 102, 103)), strict=True))
    with torch.no_grad():
        predicted = model(images).argmax(1)
    plain = mean_iou(overlaps(predicted, labels)) if labels.ndim > 1 else (predicted == labels).double().mean()
    assert rows[0][task.name] == pytest.approx(plain.item())
