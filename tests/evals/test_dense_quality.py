import json
from dataclasses import replace

import pytest
import torch

import tokenprune
from tokenprune.evals import dense_quality
from tokenprune.evals.digit_masks import mask_head, masked_digits, overlaps, patch_features
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.evals.segmentation import mean_iou


def test_rows_are_of_the_patched_model_and_are_kept(tmp_path, monkeypatch):
    arguments = ["--task", "masks", "--samples", "20", "--flops", "0.5", "--output", str(tmp_path)]
    arguments += ["--method", "top_k", "--method", "tome", "--restore", "unmerge", "--restore", "place"]
    assert dense_quality.main(arguments) == 0
    path = tmp_path / "dense-masks.json"
    rows = json.loads(path.read_text())["rows"]
    assert [(row["method"], row["restore"]) for row in rows] == [
        ("unpatched", ""),
        ("top_k", "place"),
        ("tome", "unmerge"),
        ("tome", "place"),
    ]
    assert all(row["flops_ratio"] == pytest.approx(0.5, abs=0.01) for row in rows[1:])
    assert all(row["miou_low"] <= row["miou"] <= row["miou_high"] for row in rows)

    shown = (tmp_path / "dense-masks.md").read_text().splitlines()
    assert shown[0] == "| flops | method | place | unmerge |"
    assert f"| {rows[1]['miou']:.3f} [{rows[1]['miou_low']:.3f}, {rows[1]['miou_high']:.3f}] |" in shown[2]

    model, (images, truth) = digits_vit(), masked_digits("test", 20, dense_quality.SEED)
    model.reset_classifier(0, "")
    tokenprune.patch(model, "top_k", flops=0.5, restore="place")
    with torch.inference_mode():
        predicted = mask_head()(patch_features(model, images)).argmax(1)
    assert rows[1]["miou"] == pytest.approx(mean_iou(overlaps(predicted, truth)).item())

    monkeypatch.setattr(dense_quality.Rows, "_scored", lambda *_: pytest.fail("made again"))
    assert dense_quality.main(arguments) == 0
    assert json.loads(path.read_text())["rows"] == rows


def test_a_budget_that_cannot_be_met_is_a_note():
    rows = dense_quality.Rows(dense_quality.masks_task(4))
    row = rows.row("pomt", "fusion", 0.05)
    assert "cannot be met" in row["note"]
    assert "miou" not in row
    assert rows.row("top_k", "unmerge", 0.5) is None


def test_a_threshold_is_calibrated_as_it_is_restored():
    task = dense_quality.masks_task(4)
    rows = dense_quality.Rows(replace(task, calibration=task.images))
    for restore in ("place", "fusion"):
        assert rows.row("saint", restore, 0.6)["flops_ratio"] == pytest.approx(0.6, abs=0.01)
    assert rows.row("saint", "unmerge", 0.6) is None
