"""Trainings of one diffusion model beside each other: against the rows that one model gives, and one that is worse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenprune.errors import TokenPruneError
from tokenprune.evals import checkpoint_quality, digits_checkpoints, generation
from tokenprune.evals.checkpoint_quality import compare_checkpoints, main
from tokenprune.evals.digits_denoisers import CHECKPOINTS, DIT
from tokenprune.evals.digits_pipelines import digits_pipeline
from tokenprune.evals.generation import evaluate_generation

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The shipped checkpoint, and one whose last layer is zero: it leaves the noise as it is."""
    weights = load_file(digits_checkpoints.SHIPPED / CHECKPOINTS[DIT])
    found = []
    for factor in (1.0, 0.0):
        folder = tmp_path_factory.mktemp("checkpoint")
        own = {name: factor * w if name.startswith("proj_out_2") else w for name, w in weights.items()}
        assert any(name.startswith("proj_out_2") for name in own)
        save_file(own, folder / CHECKPOINTS[DIT])
        found.append(folder)
    return found


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "REAL_IMAGES", 70)


def test_the_first_is_what_eval_says_of_it_and_a_worse_one_is_farther(folders: list[Path]) -> None:
    table = compare_checkpoints(DIT, folders, samples=6, steps=2)
    [alone] = evaluate_generation(digits_pipeline(DIT), [], [], samples=6, steps=2, baselines=False).rows
    good, bad = table.rows
    assert [row["checkpoint"] for row in table.rows] == [str(folder) for folder in folders]
    assert all(good[name] == pytest.approx(alone[name]) for name in ("frechet", "frechet_low", "accuracy"))
    assert good["frechet_ratio"] == good["frechet_ratio_low"] == 1.0
    assert bad["frechet"] / good["frechet"] == pytest.approx(bad["frechet_ratio"])
    assert bad["frechet_ratio"] > 1.2
    assert bad["frechet_ratio_low"] <= bad["frechet_ratio"] <= bad["frechet_ratio_high"]
    assert table.environment["images"] == 6


def test_a_folder_without_a_checkpoint_is_told(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TokenPruneError, match=r"no dit_digits.safetensors in"):
        compare_checkpoints(DIT, [tmp_path], samples=2)
    monkeypatch.setattr(checkpoint_quality, "draw", None)  # nothing is drawn of the first one before
    with pytest.raises(TokenPruneError, match=r"no dit_digits.safetensors in"):
        compare_checkpoints(DIT, [folders[0], tmp_path], samples=2)


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("samples", 1), ("batch_size", 0), ("steps", 0)])
def test_counts_of_nothing_are_refused(folders: list[Path], name: str, value: int) -> None:
    with pytest.raises(TokenPruneError, match=f"{name} must be a whole number of at least"):
        compare_checkpoints(DIT, folders, **{"samples": 2, name: value})


def test_the_command(folders: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_quality.torch, "set_num_threads", lambda count: None)
    main([DIT, str(folders[0]), "--samples", "2", "--steps", "1"])
    assert "frechet_ratio" in capsys.readouterr().out
