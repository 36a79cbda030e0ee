"""Rows of quality against time: drawn once, timed together, written as a table and a plot."""

from __future__ import annotations

import pytest
import torch

from tokenprune.evals import digits_denoisers, generation, generation_curves
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
    rows = [2, ("random", {"flops": 0.7}), ("tomesd", {"flops": 0.7, **generation_curves.WHOLE_BLOCK})]
    rows.append(("random", {"flops": 0.01}))
    monkeypatch.setattr(generation_curves, "ROWS", {"dit-digits": rows})
    monkeypatch.setattr(generation, "REAL_IMAGES", 70)
    arguments = ["dit-digits", "--output", str(tmp_path), "--samples", "10"]

    def run(*more):
        generation_curves.main([*arguments, *more])
        table = Table.from_json((tmp_path / "curves-dit-digits.json").read_text())
        return {(row["method"], row["budget"]): row for row in table.rows}

    first = run("--rows", "2")
    assert [key[0] for key in first] == ["unpatched", "fewer steps", "random"]  # the last one cannot be built
    assert "cannot be met" in first["random", "flops=0.01"]["note"]
    drawn = run()
    assert drawn["fewer steps", ""]["frechet"] == first["fewer steps", ""]["frechet"]
    assert drawn["random", "flops=0.7"]["flops_ratio"] == pytest.approx(0.7, abs=0.02)
    timed = run("--rounds", "2")
    whole = timed["tomesd, whole blocks", "flops=0.7"]
    assert whole["speedup"] > 0
    assert (tmp_path / "curves-dit-digits.png").stat().st_size > 0
