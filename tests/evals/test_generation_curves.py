"""Rows of quality against time: drawn once, timed together, written as a table and a plot."""

from __future__ import annotations

import shutil

import pytest
import torch

from tokenprune.evals import digits_denoisers, generation, generation_curves, generation_rows, generation_scores
from tokenprune.evals.digits_pipelines import pipeline_of
from tokenprune.evals.kept_pictures import draw_missing, kept
from tokenprune.evals.table import Table


def test_what_is_kept_is_not_drawn_again(tmp_path):
    asked = []

    def draw(number):
        asked.append(number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return torch.full((2, 3, 4, 4), float(number))

    with pytest.raises(KeyboardInterrupt):
        draw_missing(tmp_path / "row", 4, draw)
    assert kept(tmp_path / "row", 4) is None
    draw_missing(tmp_path / "row", 4, draw)
    assert asked == [0, 1, 2, 2, 3]
    pictures = kept(tmp_path / "row", 4)
    assert pictures is not None
    assert pictures[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_rows_are_drawn_timed_and_written(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = digits_denoisers.dit(num_layers=2, num_attention_heads=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(generation_curves, "digits_pipeline", lambda name: pipeline_of(model))
    monkeypatch.setattr(generation_curves, "STEPS", 3)
    rows = [
        2,
        generation_rows.First(2),
        ("random", {"flops": 0.7}),
        ("tomesd", {"flops": 0.7, **generation_rows.WHOLE_BLOCK}),
    ]
    rows += [("random", {"flops": 0.01}), ("nonsense", {"flops": 0.7})]
    monkeypatch.setattr(generation_curves, "ROWS", {"dit-digits": rows})
    monkeypatch.setattr(generation, "REAL_IMAGES", 70)
    arguments = ["dit-digits", "--output", str(tmp_path), "--samples", "10"]

    failed = []

    def run(*more):
        failed.append(generation_curves.main([*arguments, *more]))
        table = Table.from_json((tmp_path / "curves-dit-digits.json").read_text())
        return {(row["method"], row["budget"]): row for row in table.rows}

    first = run("--rows", "2")
    assert [key[0] for key in first] == ["unpatched", "fewer steps"]
    monkeypatch.setattr(generation_curves, "ROWS", {"dit-digits": rows[::-1]})
    drawn = run()
    assert "cannot be met" in drawn["random", "flops=0.01"]["note"]
    assert drawn["fewer steps", ""]["frechet"] == first["fewer steps", ""]["frechet"]
    assert drawn["random", "flops=0.7"]["flops_ratio"] == pytest.approx(0.7, abs=0.02)
    whole, random = drawn["tomesd, whole blocks", "flops=0.7"], drawn["random", "flops=0.7"]
    assert whole["over_random"] == pytest.approx(whole["frechet"] - random["frechet"])
    assert whole["over_fewer_steps"] == pytest.approx(whole["frechet"] - drawn["fewer steps", ""]["frechet"])
    leap = drawn["fewer steps, the first ones", ""]
    assert leap["frechet"] != drawn["fewer steps", ""]["frechet"]
    assert leap["over_fewer_steps"] == pytest.approx(leap["frechet"] - drawn["fewer steps", ""]["frechet"])
    assert whole["over_first_steps"] == pytest.approx(whole["frechet"] - leap["frechet"])
    assert "over_first_steps" not in drawn["fewer steps", ""]
    assert "over_random" not in random
    assert failed == [0, 1]  # a row that fails stops none of the others, and is not there
    assert "nonsense" in capsys.readouterr().err
    monkeypatch.setattr(generation_curves, "ROWS", {"dit-digits": rows[-2::-1]})

    shutil.rmtree(tmp_path / "dit-digits-0" / "by-10")  # what was found does not need the pictures
    timed = run("--rounds", "2", "--rows", "2")  # the last two rows are not timed
    assert {method for method, row in ((key[0], row) for key, row in timed.items()) if row.get("speedup")} == {
        "unpatched", "tomesd, whole blocks", "random"
    }  # fmt: skip
    timed = run("--rounds", "2")
    assert timed["fewer steps", ""]["speedup"] > 0
    assert "over_equal_time" in timed["tomesd, whole blocks", "flops=0.7"]
    assert (tmp_path / "curves-dit-digits.png").stat().st_size > 0


def _scored(steps, distance, draws):
    return {"cells": {"steps": steps, "frechet": distance}, "draws": draws, "device": "cpu"}


def test_a_row_is_held_to_the_longest_run_that_costs_no_more_with_paired_draws():
    runs = [_scored(9, 1.0, [0.5, 1.5, 1.0]), _scored(6, 2.0, [1.5, 2.5, 2.0]), _scored(10, 0.5, [0.5])]
    cost = {9: 0.9, 6: 0.7}  # the longest was not timed
    assert generation_scores.longest(runs, 0.95, cost) is runs[0]
    assert generation_scores.longest(runs, 0.89, cost) is runs[1]
    assert generation_scores.longest(runs, 0.69, cost) is None
    row = _scored(10, 3.0, [2.5, 3.5, 3.0])
    assert generation_scores.above(row, runs[0], "over") == {"over": 2.0, "over_low": 2.0, "over_high": 2.0}
    assert generation_scores.above(row, _scored(1, None, []), "over") == {}
