"""`tokenprune compare`: its rows against those of bench and eval, going on, and the page against the rows."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tokenprune import cli
from tokenprune.evals import digits_denoisers, digits_lvlm, digits_pipelines, generation, lvlm_bench
from tokenprune.evals.comparison import answering, measuring
from tokenprune.evals.comparison.advice import QUALITIES, Quality, advised, frontier, qualities
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Table
from tokenprune.evals.throughput import Relative, Timing

COMMAND = ["compare", "--model", "digits-vit", "--method", "tome", "--method", "top_k", "--samples", "6"]
COMMAND += ["--flops", "0.6", "--flops", "0.5", "--batch-size", "2", "--quiet", "--threads", "1", "--output"]


SMALLER = ["smaller input", "smaller input, bilinear", "smaller input, area"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    place = tmp_path_factory.mktemp("compared")
    assert cli.main([*COMMAND, str(place)]) == 0
    torch.set_num_threads(threads)
    return place


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_row_for_every_method_and_budget_with_the_baselines(folder):
    rows = Table.from_json((folder / "compare.json").read_text()).rows
    assert [row["method"] for row in rows] == [
        "unpatched",
        *2 * ["tome", "top_k", "random", "uniform", *SMALLER],
    ]
    for row in rows[1:]:
        budget = float(row["budget"].removeprefix("flops="))
        assert row["flops_ratio"] == pytest.approx(budget, abs=0.06)
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 <= row["top1"] <= 1
        assert row["control"] > 0
        assert row["model"] == "digits-vit"
    assert (folder / "compare.csv").read_text().count("\n") == 1 + len(rows)
    assert (folder / "compare.md").read_text().startswith("| model |")


def test_the_page_holds_what_the_table_holds_and_loads_nothing(folder):
    page = (folder / "compare.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page), "an address outside of the page"
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page)
    assert "<!--" not in page.replace("<!doctype", ""), "a part that was not filled in"
    (model,) = data_of(page)["models"]
    rows = Table.from_json((folder / "compare.json").read_text()).rows
    assert [{"model": "digits-vit", **row} for row in model["rows"]] == rows
    assert len(model["pictures"]) == 2
    arms = {(arm["method"], arm["budget"]): arm for arm in model["overlays"]["arms"]}
    assert len(arms) == 8
    tokens = {(row["method"], row["budget"]): row["tokens"] for row in rows}
    for key, arm in arms.items():
        for source in arm["places"][-1]["source"]:
            assert len(source) == 100 == model["overlays"]["grid"][0] * model["overlays"]["grid"][1]
            assert len({token for token in source if token >= 0}) == tokens[key]
    assert "--method tome --method top_k" in data_of(page)["command"]


def test_a_run_goes_on_where_it_was_stopped(folder, monkeypatch, capsys):
    before = (folder / "compare.json").read_text()
    measured = sorted((folder / "measured").glob("digits-vit-*.json"))
    assert len(measured) == 2
    measured[1].unlink()
    timed = []
    whole = measuring.bench_together

    def counted(arms, images, **rest):
        timed.append({arm.budget for arm in arms} - {""})
        return whole(arms, images, **rest)

    monkeypatch.setattr(measuring, "bench_together", counted)
    assert cli.main([*COMMAND, str(folder)]) == 0
    assert timed == [{measured[1].stem.removeprefix("digits-vit-")}]
    again = Table.from_json((folder / "compare.json").read_text()).rows
    timings = ("speedup", "control", "trusted", "images_per_s")
    plain = [
        [{k: v for k, v in row.items() if not k.startswith(timings)} for row in rows]
        for rows in (again, Table.from_json(before).rows)
    ]
    assert plain[0] == plain[1]
    assert cli.main([*COMMAND[:-1], "--seed", "1", "--output", str(folder)]) == 1
    assert "seed 0, now 1" in capsys.readouterr().err
    whole = measured[0].read_text()
    for content in (whole[:50], "{}", "[]"):
        measured[0].write_text(content)
        assert cli.main([*COMMAND, str(folder)]) == 1
        assert f"{measured[0]} is damaged" in capsys.readouterr().err
    measured[0].write_text(whole)
    for content in ("{", "[3]", "3"):
        (folder / "measured" / "settings.json").write_text(content)
        assert cli.main([*COMMAND, str(folder)]) == 1
        assert "damaged" in capsys.readouterr().err
    assert cli.main([*COMMAND[:-1], "--rounds", "19", "--output", str(folder)]) == 1
    assert "--rounds 19" in capsys.readouterr().err


def test_adaptive_methods_meet_the_budget_in_the_mean_and_say_how(tmp_path):
    one = [word for word in COMMAND if word not in ("tome", "top_k", "0.5", "0.6")]
    one = [word for word in one if word not in ("--method", "--flops")]
    named = [word for name in ("adaptive_tome", "ats", "saint") for word in ("--method", name)]
    torch_threads = torch.get_num_threads()
    assert cli.main([one[0], *named, "--flops", "0.6", "--keep", "0.5", *one[1:], str(tmp_path)]) == 0
    torch.set_num_threads(torch_threads)
    rows = {
        (row["method"], row["budget"]): row for row in Table.from_json((tmp_path / "compare.json").read_text()).rows
    }
    for method in ("adaptive_tome", "saint"):
        row = rows[method, "flops=0.6"]
        assert row["note"].startswith("threshold=0.")
        assert row["note"].endswith("found on 6 images without labels")
        assert row["flops_ratio"] == pytest.approx(0.6, abs=0.011)  # in the mean over the same images
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert rows[method, "keep=0.5"]["note"] is None
    assert "keeps so few by itself" in rows["ats", "flops=0.6"]["note"]
    (told,) = data_of((tmp_path / "compare.html").read_text())["models"]
    drawn = {(arm["method"], arm["budget"]) for arm in told["overlays"]["arms"]}
    assert {("adaptive_tome", "flops=0.6"), ("saint", "flops=0.6"), ("ats", "keep=0.5")} < drawn


SMALL = ["--method", "tomesd", "--flops", "0.8", "--flops", "0.65", "--samples", "8", "--steps", "3"]
SMALL += ["--threads", "1", "--quiet"]


def test_diffusion_models_stand_beside_every_kind_of_fewer_steps(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=2, num_attention_heads=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(digits_pipelines, "digits_pipeline", lambda name: digits_pipelines.pipeline_of(model))
    monkeypatch.setattr(generation, "REAL_IMAGES", 70)
    timed = []

    def together(calls, rounds, **_):
        timed.append(len(calls))
        return [Relative(Interval(speed, speed, speed), 1.0, 1.0) for speed in (1.0, *[1.5] * (len(calls) - 1))]

    monkeypatch.setattr("tokenprune.evals.generation_bench.measure_together", together)
    command = ["compare", "--model", "dit-digits", *SMALL, "--output", str(tmp_path)]
    assert cli.main(command) == 0
    rows = Table.from_json((tmp_path / "compare.json").read_text()).rows
    fewer = ["fewer steps", "fewer steps, UniPC", "fewer steps, the first ones"]
    assert [row["method"] for row in rows] == ["unpatched", *2 * ["tomesd", "random", "uniform", *fewer]]
    assert [row["steps"] for row in rows if row["method"] in fewer] == [2] * 6
    assert all(row["frechet_low"] <= row["frechet"] <= row["frechet_high"] for row in rows)
    assert len({row["frechet"] for row in rows if row["budget"] == "flops=0.65"}) == 6
    (told,) = data_of((tmp_path / "compare.html").read_text())["models"]
    assert [one["column"] for one in told["qualities"]] == ["frechet", "accuracy"]
    assert [one["method"] for one in told["drawn"]] == [row["method"] for row in rows]
    assert {len(one["pictures"]) for one in told["drawn"]} == {6}
    base, tomesd = told["drawn"][0]["pictures"], told["drawn"][1]["pictures"]
    assert base != tomesd
    assert told["drawn"][4]["pictures"] == told["drawn"][10]["pictures"], "two even steps are two even steps"
    assert all(picture.startswith("data:image/png;base64,") for picture in base + tomesd)
    before = len(timed)
    assert cli.main(command) == 0
    assert len(timed) == before, "what was drawn is timed again"
    assert Table.from_json((tmp_path / "compare.json").read_text()).rows == rows
    assert cli.main([*command[:-1], str(tmp_path / "other"), "--data", "nowhere"]) == 1
    assert "--data" in capsys.readouterr().err


def test_vision_language_models_are_judged_by_what_they_name_and_find(tmp_path, monkeypatch, capsys):
    def measure(*works, **_):
        return Timing(20, 1, 1.0, 0.5, Interval(2.0, 1.9, 2.1), 1.0, True, 1, None, None)

    monkeypatch.setattr(lvlm_bench, "measure", measure)
    options = ["--method", "fopru", "--keep", "0.5", "--samples", "3", "--threads", "1", "--quiet"]
    command = ["compare", "--model", digits_lvlm.LVLM, *options, "--output", str(tmp_path)]
    assert cli.main(command) == 0
    rows = Table.from_json((tmp_path / "compare.json").read_text()).rows
    names = [row["method"] for row in rows]
    assert len(set(names)) == len(names)
    assert {"unpatched", "fopru", "fopru, positions counted anew", "fopru, rows", "random", "uniform"} <= set(names)
    assert rows[0]["speedup"] == 1.0
    assert {row["speedup"] for row in rows[1:]} == {2.0}
    (told,) = data_of((tmp_path / "compare.html").read_text())["models"]
    assert [one["column"] for one in told["qualities"]] == ["recognition", "localisation"]
    assert all("Fastest within" in one["advice"][0] or "No method" in one["advice"][0] for one in told["qualities"])
    assert (told["drawn"], told["pictures"]) == ([], [])
    monkeypatch.setattr(answering, "evaluate_lvlm", None)  # what is there is not asked again
    assert cli.main(command) == 0
    assert cli.main([*command[:-1], str(tmp_path / "other"), "--steps", "3"]) == 1
    assert "--steps" in capsys.readouterr().err


def row(method, budget, top1, speedup, trusted=True):
    return {"method": method, "budget": budget, "top1": top1, "speedup": speedup, "trusted": trusted}


TOP1 = QUALITIES[0]
ROWS = [
    row("unpatched", "", 0.90, 1.0),
    row("tome", "flops=0.6", 0.895, 1.5),
    row("top_k", "flops=0.6", 0.80, 1.6),
    row("random", "flops=0.6", 0.60, 1.6),
    row("pitome", "flops=0.6", None, None),
    row("tome", "flops=0.5", 0.70, 1.8, trusted=False),
    row("smaller input", "flops=0.5", 0.75, 1.9),
]


def test_the_frontier_is_what_no_other_row_beats_in_both():
    naive = [
        i
        for i, own in enumerate(ROWS)
        if own["top1"] is not None
        and not any(
            other is not own
            and other["top1"] is not None
            and other["top1"] >= own["top1"]
            and other["speedup"] >= own["speedup"]
            for other in ROWS
        )
    ]
    assert sorted(frontier(ROWS, TOP1)) == naive == [0, 1, 2, 6]
    assert frontier(ROWS, TOP1) == [0, 1, 2, 6], "from the slowest on"
    turned = [{**row, "frechet": None if row["top1"] is None else 1 - row["top1"]} for row in ROWS]
    assert frontier(turned, Quality("frechet", "distance", lower=True)) == [0, 1, 2, 6]


def test_the_advice_names_the_fastest_that_loses_nothing_and_says_what_is_doubtful():
    first, at_06, at_05, doubtful = advised(ROWS, *qualities(ROWS))
    assert "patch(model, 'tome', flops=0.6)" in first
    assert "1.50 times" in first
    assert at_06.startswith("At flops=0.6 the best that is faster than no method is tome")
    assert "random 0.600 at 1.60 times" in at_06
    assert "smaller input 0.750" in at_05
    assert doubtful.startswith("1 of 3 speeds")


def test_the_advice_says_that_nothing_is_faster_or_good_enough():
    slow = [ROWS[0], row("tome", "flops=0.6", 0.9, 0.8)]
    assert "is faster than no method here" in advised(slow, TOP1)[0]
    assert "No method stays within 0.01" in advised([ROWS[0], ROWS[2]], TOP1)[0]
    assert advised([ROWS[0], ROWS[4]], TOP1) == ["No method could be run here; the notes in the table say why."]


def test_the_best_at_a_budget_is_one_that_is_faster():
    better = row("pitome", "flops=0.6", 0.90, 0.9)
    [_, at_06] = advised([*ROWS[:2], better], TOP1)
    assert at_06.startswith("At flops=0.6 the best that is faster than no method is tome")
    [_, alone] = advised([ROWS[0], better], TOP1)
    assert alone.startswith("At flops=0.6 no method is faster than none, the best is pitome")


@pytest.mark.parametrize(
    ("method", "note", "call"),
    [
        (
            "saint",
            "threshold=0.9713, found",
            "patch(model, schedule=tokenprune.calibrate(model, images, 'saint', flops=0.6))",
        ),
        ("ats", "keep=0.6875, found on 64 images", "patch(model, 'ats', keep=0.6875)"),
        ("ats", "default, found on 64 images", "patch(model, 'ats')"),
    ],
)
def test_the_call_of_an_adaptive_method_is_what_was_found_for_the_budget(method, note, call):
    first, *_ = advised([ROWS[0], row(method, "flops=0.6", 0.895, 1.5) | {"note": note}], TOP1)
    assert first.endswith(f", by {call}.")
    first, *_ = advised([ROWS[0], row(method, "keep=0.5", 0.895, 1.5)], TOP1)
    assert first.endswith(f", by patch(model, {method!r}, keep=0.5).")


def test_what_learned_for_the_model_is_told_beside_what_need_not():
    learned = row("dynamicvit", "flops=0.6", 0.897, 1.9) | {"top1_drop_low": -0.004, "top1_drop_high": 0.01}
    first, other, *_ = advised([*ROWS, learned], TOP1)
    assert "dynamicvit at flops=0.6 with 0.897 (-0.004 to +0.010 lost) at 1.90 times" in first
    assert other.startswith("It has learned for this model. Of those that learn nothing: Fastest within")
    assert "patch(model, 'tome', flops=0.6)" in other


def test_maps_of_classes_are_judged_by_mean_iou():
    rows = [{**one, "miou": one["top1"]} | {"top1": None} for one in ROWS]
    assert [quality.column for quality in qualities(rows)] == ["miou"]
