import pytest
import torch
from PIL import Image

import tokenprune
from tokenprune import cli
from tokenprune.evals import demo
from tokenprune.evals.models import load_model
from tokenprune.evals.table import Table


@pytest.fixture
def quick(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(demo, "BUDGETS", [demo.PICTURE_BUDGET])
    monkeypatch.setattr(demo, "BATCH", 2)
    yield
    torch.set_num_threads(threads)


def test_demo_writes_a_table_and_two_pictures(quick, tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--samples", "12", "--threads", "1", "--quiet"]) == 0
    table = Table.from_json((tmp_path / "out" / "table.json").read_text())
    names = {method.name for method in tokenprune.methods(load_model("digits-vit").model)} - {"flip", "noise_mask"}
    assert {row["method"] for row in table.rows} == names | {"unpatched", "smaller input"}
    for row in table.rows:
        if row["method"] in ("ats", "saint", "algm", "adaptive_tome"):  # adaptive: no flops= before it is calibrated
            assert "calibration" in row["note"]
            continue
        if row["method"] in ("sit", "sinkhorn", "patch_merger"):  # nothing is shipped
            assert "has to learn for this model first" in row["note"]
            continue
        assert row["note"] is None or row["method"] == "smaller input", row
        assert 0 <= row["top1"] <= 1
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["control"] > 0
        assert row["flops_ratio"] == pytest.approx(1.0 if row["method"] == "unpatched" else 0.6, abs=0.05)
    assert (tmp_path / "out" / "table.md").read_text().startswith("| method |")
    assert (tmp_path / "out" / "table.csv").exists()
    for name in ("kept-tokens.png", "accuracy-against-speed.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 400
    assert "written to" in capsys.readouterr().out


def test_join_pairs_rows_by_method_and_budget():
    def table(column, values):
        return Table([{"method": "a", "budget": budget, column: values[budget], "note": None} for budget in values])

    rows = demo.join(table("top1", {"x": 1.0, "y": 2.0}), table("speedup", {"y": 4.0, "x": 3.0})).rows
    assert [(row["top1"], row["speedup"]) for row in rows] == [(1.0, 3.0), (2.0, 4.0)]
