"""What is learned beside other methods: scores, ratios and paired differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenprune.evals import tuned_masks
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


def test_weights_that_were_trained_along_are_used_and_nothing_else_runs_on_them(tmp_path: Path) -> None:
    model, task = load_model("digit-masks").model, TASKS["digit-masks"]
    start_of(model, "cropr", 0.5, 0, Distillation(), 0.0, {}).save(tmp_path)
    state = {name: torch.zeros_like(x) if "upconv" in name else x for name, x in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    rows = compare(task, model, [str(tmp_path)], flops=0.5, samples=4, rule={}, seeds=(5,))
    _, labels = task.draw(4, 5)
    assert rows[3]["miou"] == pytest.approx(mean_iou(overlaps(torch.zeros_like(labels), labels)).item())
    assert rows[0]["miou"] > rows[3]["miou"] + 0.2


def test_tuned_masks_are_those_of_a_loop(tmp_path: Path) -> None:
    """Two steps of AdamW on the canvases of the training's own order; in eval mode."""
    tuned_masks.main(["--output", str(tmp_path), "--samples", "4", "--batch-size", "2", "--epochs", "1"])
    found, loaded = load_file(tmp_path / "model.safetensors"), load_model("digit-masks")
    assert loaded.training is not None
    data, order = loaded.training(4, 0), torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.AdamW(loaded.model.parameters(), weight_decay=0.05)
    for step, rate in enumerate((5e-4, 2.5e-4)):  # half a cosine
        images, labels = (torch.stack(one) for one in zip(*(data.items[i] for i in order[2 * step :][:2]), strict=True))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(loaded.model(images), labels).backward()
        optimizer.step()
    for name, tensor in loaded.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
