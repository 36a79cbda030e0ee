from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, images
from torch import nn

import tokenprune
from tokenprune.evals.digits_swin import digits_swin
from tokenprune.evals.digits_vit import digits_vit
from tokenprune.stored_schedule import StoredSchedule, load_schedule, shipped_schedules

SHARES = {1: 0.7, 2: 0.5}


def test_a_file_patches_as_the_mapping_does(tmp_path: Path) -> None:
    model = build("class_token")
    x = images(model)
    file = tmp_path / "found.json"
    StoredSchedule("tome", SHARES, {"proportional": False}).save(file)
    with torch.no_grad():
        expected = tokenprune.patch(model, "tome", schedule=SHARES, proportional=False)(x)
        for source in (file, str(file), load_schedule(file)):
            tokenprune.unpatch(model)
            assert torch.equal(tokenprune.patch(model, schedule=source)(x), expected)
        assert torch.equal(tokenprune.patch(model, "tome", schedule=file)(x), expected)
        assert not torch.equal(tokenprune.patch(model, schedule=file, proportional=True)(x), expected)


def test_a_schedule_of_another_method_is_refused(tmp_path: Path) -> None:
    model = build("class_token")
    with pytest.raises(tokenprune.UnsupportedMethod, match="found for tome"):
        tokenprune.patch(model, "top_k", schedule=StoredSchedule("tome", SHARES))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no schedule"),
        ("[]", "no schedule"),
        (json.dumps({"version": 1, "method": "tome"}), "no schedule"),
        (json.dumps({"version": 9, "method": "tome", "options": {}, "schedule": {"1": 0.5}, "found": {}}), "version 9"),
        (json.dumps({"version": 1, "method": "tome", "options": {}, "schedule": {"1": 5}, "found": {}}), "share in"),
        (json.dumps({"version": 1, "method": "tome", "options": {}, "schedule": [1], "found": {}}), "must map"),
        (json.dumps({"version": 1, "method": None, "options": {}, "schedule": {"1": 0.5}, "found": {}}), "no method"),
        (json.dumps({"version": 1, "method": "tome", "options": 3, "schedule": {"1": 0.5}, "found": {}}), "no method"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(tokenprune.BudgetError, match=message):
        tokenprune.patch(build("class_token"), schedule=tmp_path / "wrong.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_bytes(b"\x80\xff")
    with pytest.raises(tokenprune.BudgetError, match="no schedule"):
        tokenprune.patch(build("class_token"), schedule=tmp_path / "wrong.json")


def test_a_name_that_is_not_shipped_is_told_with_those_that_are() -> None:
    with pytest.raises(tokenprune.BudgetError, match="neither a file nor shipped"):
        tokenprune.patch(build("class_token"), schedule="absent")
    with pytest.raises(tokenprune.BudgetError, match="must map"):
        tokenprune.patch(build("class_token"), schedule=0.6)  # type: ignore[arg-type]
    for name in shipped_schedules():
        assert load_schedule(name).found["flops_ratio"] < 1.0


@pytest.mark.parametrize(
    ("name", "build_model", "method"),
    [
        ("digits-vit-top_k-0.6", digits_vit, "top_k"),
        ("digits-swin-sparsevit-0.65", digits_swin, "sparsevit"),
    ],
)
def test_those_of_the_shipped_models_fit_them(name: str, build_model: Callable[[], nn.Module], method: str) -> None:
    assert name in shipped_schedules()
    model = tokenprune.patch(build_model(), schedule=name)
    report = tokenprune.report(model).to_dict()
    assert report["method"] == method
    assert report["flops_ratio"] == pytest.approx(load_schedule(name).found["flops_ratio"], abs=1e-6)
