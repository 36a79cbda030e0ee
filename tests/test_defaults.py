"""What `patch` takes where no method is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import build
from windows_zoo import build as build_swin

import tokenprune
from tokenprune import defaults
from tokenprune.budget import Budget, parse_budget
from tokenprune.defaults import default_choices, default_rows
from tokenprune.evals import default_table
from tokenprune.evals.default_table import TOWERS, tower_rows
from tokenprune.method_families import shipped_table
from tokenprune.registry import make_method


def test_every_family_and_budget_has_a_choice_that_works_there() -> None:
    table = shipped_table()
    budgets = [
        parse_budget(),
        *(parse_budget(**{kind: v}) for kind in ("keep", "flops") for v in (0.01, 0.5, 0.7, 1.0)),
    ]
    for family, adapter in table.adapters.items():
        if family == "LLaVA: inside the language model":  # the default works behind the tower
            continue
        for budget in budgets:
            for choice in default_choices(adapter, budget):
                make_method(choice.method, dict(choice.options))
            assert {choice.method for choice in default_choices(adapter, budget)} & set(table.works(family))
    assert default_choices("of a third party", Budget())


def test_the_report_says_what_was_chosen_and_from_where() -> None:
    data = tokenprune.report(tokenprune.patch(build("class_token"), flops=0.8)).to_dict()
    first = default_choices("timm_vit", Budget("flops", 0.8))[0]
    assert data["method"] == first.method
    assert data["chosen"] == f"{first.method} was chosen for timm_vit and flops=0.8, from {first.source}"
    model = tokenprune.patch(build_swin(), keep=0.5)
    assert "sparsevit was chosen for timm_swin and keep=0.5" in str(tokenprune.report(model))
    assert tokenprune.report(tokenprune.patch(model, "top_k", keep=0.5)).to_dict()["chosen"] == ""


def test_the_first_that_works_and_meets_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"families": ["timm_vit"], "flops": [0.5, 1.0], "methods": ["sparsevit", "top_k"], "source": "a"},
        {"families": ["timm_vit"], "flops": [0.0, 0.5], "methods": [["random", {"seed": 3}], "top_k"], "source": "b"},
        {"families": ["timm_vit"], "methods": ["tome", "uniform"], "source": "c"},
    ]
    monkeypatch.setattr(defaults, "default_rows", lambda: rows)
    model = build("class_token")

    def chosen(**budget: float) -> str:
        return str(tokenprune.report(tokenprune.patch(model, **budget)).to_dict()["chosen"])

    assert chosen(flops=0.8).startswith("top_k")
    assert chosen(flops=1.0).endswith("from a")
    assert chosen(flops=0.49).startswith("random")
    assert chosen(keep=0.6).startswith("tome")
    assert chosen(keep=0.03).startswith("uniform")  # four blocks that halve leave more than one of 35
    with pytest.raises(tokenprune.BudgetError, match="flops="):
        tokenprune.patch(model, flops=0.01)


def test_rows_from_measured_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def task(scores: dict[str, tuple[float, float]]) -> dict[str, object]:
        rows = [
            {"method": method, "flops": flops, "flops_ratio": flops, "score": score}
            for method, pair in scores.items()
            for flops, score in zip((0.8, 0.4), pair, strict=True)
        ]
        return {"measure": "score", "rows": rows}

    quality = {
        "one": task({"tome": (0.99, 0.8), "top_k": (0.9, 0.9), "evit": (1.0, 0.1), "saint": (1.0, 1.0)}),
        "two": task({"tome": (0.97, 0.8), "top_k": (0.9, 0.9), "evit": (0.2, 0.1), "saint": (1.0, 1.0)}),
    }
    quality["neighbours"] = task({"tome": (0.1, 0.1), "evit": (1.0, 1.0)})  # too few drawings to rank methods by
    missed = {"method": "pomt", "flops": 0.8, "flops_ratio": 0.9, "score": 1.0}
    for part in quality.values():
        part["rows"].append(missed)  # type: ignore[attr-defined]
    high, low, other = tower_rows(quality, "there")
    assert (high["flops"], high["methods"]) == ([0.6, 1.0], ["tome", "top_k", "evit"])
    assert (low["flops"], low["methods"]) == ([0.0, 0.6], ["top_k", "tome", "evit"])
    assert (other["methods"], "flops" in other) == (["top_k", "tome", "evit"], False)
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    default_table.main([str(tmp_path / "quality.json")])
    printed = json.loads(capsys.readouterr().out)
    assert [row for row in printed if row["families"] != TOWERS] == [
        r for r in default_rows() if r["families"] != TOWERS
    ]
