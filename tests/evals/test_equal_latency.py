"""Searched schedules beside the method's own: what is compared with what, on a model of a few tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from windows_zoo import build, images

import tokenprune
from tokenprune.evals import equal_latency
from tokenprune.evals.data import open_data
from tokenprune.evals.equal_latency import UNPATCHED, _as_fast, against_own
from tokenprune.evals.stats import Interval
from tokenprune.evals.throughput import Relative
from tokenprune.stored_schedule import StoredSchedule


def flops(model: nn.Module) -> float:
    ratio: float = tokenprune.report(model).to_dict()["flops_ratio"]
    return ratio


def as_promised(arms: list[partial[None]], rounds: int, **_: object) -> list[Relative]:
    """Times as if they were the multiply-adds: of a model of a few tokens they are chance."""
    unpatched = (0, len(arms) - 1)
    speedups = [1.0 if i in unpatched else 1.0 / flops(arm.args[0]) for i, arm in enumerate(arms)]
    return [Relative(Interval(one, one, one), 1.0, 1.0 / one) for one in speedups]


def test_rows_are_those_of_the_arms_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_latency, "measure_together", as_promised)
    monkeypatch.setattr(equal_latency, "STEPS", range(-1, 3))
    model, x = build(), images(batch=12)
    with torch.no_grad():
        answers = model(x).argmax(1)
    labels = answers.clone()
    labels[::3] = (labels[::3] + 1) % 7
    data = open_data((x, labels))
    found = StoredSchedule("sparsevit", {0: 0.25, 3: 0.5, 5: 0.2})
    rows = {row["schedule"]: row for row in against_own(model, data, {"found": found}, timed=x[:2], rounds=20).rows}
    assert rows[UNPATCHED]["top1"] == pytest.approx(8 / 12)
    assert rows[UNPATCHED]["agreement"] == 1.0
    tokenprune.patch(model, schedule=found)
    assert rows["found"]["flops"] == pytest.approx(flops(model))
    beside = rows[rows["found"]["beside"]]
    assert rows["found"]["flops"] <= beside["flops"] < rows["found"]["flops"] + 0.03
    for row, patch in ((rows["found"], {"schedule": found}), (beside, {"flops": float(str(beside["schedule"])[6:])})):
        tokenprune.patch(model, "sparsevit", **patch)
        with torch.no_grad():
            patched = model(x).argmax(1)
        assert row["top1"] == pytest.approx(float((patched == labels).double().mean()))
        assert row["agreement"] == pytest.approx(float((patched == answers).double().mean()))
    for name in ("top1", "agreement"):
        assert rows["found"][f"{name}_gain"] == pytest.approx(rows["found"][name] - beside[name])


def test_the_fastest_that_is_no_faster_is_taken() -> None:
    own = {name: Interval(value, value, value) for name, value in {"a": 1.1, "b": 1.4, "c": 1.6}.items()}
    assert _as_fast(Interval(1.5, 1.5, 1.5), own, "found") == "b"
    assert _as_fast(Interval(1.4, 1.4, 1.4), own, "found") == "b"
    with pytest.raises(tokenprune.TokenPruneError, match="found is slower"):
        _as_fast(Interval(1.0, 1.0, 1.0), own, "found")


def test_schedules_of_two_methods_are_refused() -> None:
    both = {"a": StoredSchedule("sparsevit", {0: 0.5}), "b": StoredSchedule("random", {0: 0.5})}
    model, x = build(), images()
    with pytest.raises(tokenprune.TokenPruneError, match="2 methods"):
        against_own(model, open_data((x, torch.tensor([0, 6]))), both, timed=x)
