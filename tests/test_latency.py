from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, images
from torch import nn

import tokenprune
from tokenprune.latency import LatencyRow, LatencyTable, load_table, table_path

HALF = LatencyRow(8, 35, (1.0, 0.5), (1.0, 0.6), {"top_k": 0.01})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def model() -> nn.Module:
    return build("class_token")


def stored(model: nn.Module, *rows: LatencyRow) -> None:
    LatencyTable(rows, {"rounds": 20}).save(table_path(model))


@pytest.mark.parametrize("flops", [0.1, 0.3, 0.45, 0.8, 0.99, 1.0, 1.2])
def test_time_between_what_was_measured(flops: float) -> None:
    row = LatencyRow(1, 9, (1.0, 0.7, 0.3), (1.0, 0.9, 0.5), {})
    assert row.of_flops(flops) == pytest.approx(np.interp(flops, row.flops[::-1], row.latency[::-1]))


def test_without_a_table_nothing_is_timed_and_the_report_says_so(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("timed"))
    tokenprune.patch(model, "top_k", flops=0.6)
    assert "speed not checked here" in str(tokenprune.report(model))
    assert load_table(model) is None
    with pytest.raises(tokenprune.SlowdownError, match="no latency table"):
        tokenprune.patch(model, "top_k", flops=0.6, require_speedup=True)
    assert tokenprune.report(model).to_dict()["budget"] == "flops=0.6"


def test_a_predicted_speedup_is_in_the_report(model: nn.Module) -> None:
    stored(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenprune.patch(model, "top_k", flops=0.6, require_speedup=True)
    report = tokenprune.report(model).to_dict()
    share = 0.6 + (report["flops_ratio"] - 0.5) / 0.5 * 0.4 + 0.01 * len(report["places"])
    assert report["speed"] == f"predicted speed-up {1 / share:.2f} at batch 8, 35 tokens"


def test_a_table_of_a_machine_that_was_not_quiet_promises_nothing(model: nn.Module) -> None:
    LatencyTable((HALF,), {"rounds": 20, "trusted": False}).save(table_path(model))
    with pytest.raises(tokenprune.SlowdownError, match="not quiet"):
        tokenprune.patch(model, "top_k", flops=0.6, require_speedup=True)
    tokenprune.patch(model, "top_k", flops=0.6)
    assert tokenprune.report(model).to_dict()["speed"].endswith("(measured while the machine was not quiet)")


def test_a_predicted_slowdown_warns_and_raises_where_a_speedup_is_required(model: nn.Module) -> None:
    dear = LatencyRow(1, 35, (1.0, 0.5), (1.0, 0.6), {"top_k": 0.2})
    stored(model, HALF, dear)
    x = images(model)
    plain = model(x)
    with pytest.raises(tokenprune.SlowdownError, match=r"0\.\d\d at batch 1, 35 tokens times"):
        tokenprune.patch(model, "top_k", flops=0.6, require_speedup=True)
    assert torch.equal(model(x), plain)
    with pytest.warns(UserWarning, match="not faster") as caught:
        tokenprune.patch(model, "top_k", flops=0.6)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert "batch 8" not in str(caught[0].message)
    assert not torch.equal(model(x), plain)


def test_another_resolution_is_predicted_at_its_own_tokens(model: nn.Module) -> None:
    stored(model, LatencyRow(8, 140, (1.0, 0.5), (1.0, 0.5), {"top_k": 0.0}))
    tokenprune.patch(model, "top_k", keep=0.5)
    said = tokenprune.report(model).to_dict()["speed"]
    large = build("class_token")
    large.set_input_size((40, 56))
    tokenprune.patch(large, "top_k", keep=0.5)
    ratio = tokenprune.report(large).to_dict()["flops_ratio"]
    assert said == f"predicted speed-up {1 / ratio:.2f} at batch 8, 140 tokens"


def test_a_table_is_for_its_dtype_threads_and_model(model: nn.Module) -> None:
    stored(model, HALF)
    assert load_table(model) is not None
    assert load_table(build("registers")) is None
    assert load_table(model.to(torch.bfloat16)) is None
    model.float()
    torch.set_num_threads(2)
    try:
        assert load_table(model) is None
    finally:
        torch.set_num_threads(1)


def test_what_was_not_measured_is_not_checked(model: nn.Module) -> None:
    stored(model, HALF)
    for method, budget in (("tome", {"flops": 0.6}), ("ats", {"keep": 0.5}), ("top_k", {"keep": 1.0})):
        tokenprune.patch(model, method, **budget)
        assert "speed not checked here" in tokenprune.report(model).to_dict()["speed"]


@pytest.mark.parametrize(
    ("method", "asked", "told"),
    [
        ("top_k", {"keep": 1.0}, "keep=1 removes nothing"),
        ("ats", {"keep": 0.5}, "ats keeps as many tokens as each image needs"),
        ("adaptive_tome", {}, "such as 'top_k'"),
        ("flip", {}, "flip acts in training forwards alone"),
    ],
)
@pytest.mark.parametrize("profiled", [True, False])
def test_why_no_table_could_predict_it(
    model: nn.Module, profiled: bool, method: str, asked: dict[str, float], told: str
) -> None:
    if profiled:
        stored(model, replace(HALF, overhead={method: 0.01}))
    with pytest.raises(tokenprune.SlowdownError, match=told) as raised:
        tokenprune.patch(model, method, **asked, require_speedup=True)
    assert "no latency table" not in str(raised.value)
    tokenprune.patch(model, method, **asked)
    assert told in tokenprune.report(model).to_dict()["speed"]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 7}'])
def test_what_is_no_table_is_refused(model: nn.Module, text: str) -> None:
    stored(model, HALF)
    table_path(model).write_text(text)
    with pytest.raises(tokenprune.TokenPruneError, match="delete it"):
        tokenprune.patch(model, "top_k", flops=0.6)


@pytest.mark.parametrize(
    "changed",
    [
        {"environment": []},
        {"environment": "quiet"},
        {"flops": "abc"},
        {"latency": [1.0]},
        {"flops": [], "latency": []},
        {"latency": [float("nan"), float("nan")]},
        {"overhead": {"top_k": "x"}},
        {"overhead": []},
        {"tokens": "many"},
        {"tokens": 0},
        {"batch": 1.5},
    ],
)
def test_a_damaged_table_is_refused(model: nn.Module, changed: dict[str, object]) -> None:
    stored(model, HALF)
    row: dict[str, object] = {"batch": 1, "tokens": 35, "flops": [1.0, 0.5], "latency": [1.0, 0.6], "overhead": {}}
    data = {"version": 1, "rows": [row], "environment": {}}
    table_path(model).write_text(json.dumps(data))
    tokenprune.patch(model, "top_k", flops=0.6)
    for key, value in changed.items():
        (data if key in data else row)[key] = value
    table_path(model).write_text(json.dumps(data))
    with pytest.raises(tokenprune.TokenPruneError, match="delete it"):
        tokenprune.patch(model, "top_k", flops=0.6)


def test_a_resolution_at_which_the_budget_cannot_be_met_does_not_forbid_the_usual_one(model: nn.Module) -> None:
    stored(model, replace(HALF, tokens=3))
    tokenprune.patch(model, "top_k", tokens=20)
    assert "speed not checked here" in tokenprune.report(model).to_dict()["speed"]
