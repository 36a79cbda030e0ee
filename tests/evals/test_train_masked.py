"""The training with patches dropped: what is masked, and that it goes on exactly after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tokenprune.evals import train_diffusion
from tokenprune.evals.train_diffusion import Recipe, Training
from tokenprune.evals.train_masked import MaskedTraining, train
from tokenprune.evals.training_speed import CASES, Case, dit, speed

torch.set_num_threads(1)
RECIPE = Recipe(1, 3, 2e-3)
MASKED = 2


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_diffusion, "BATCH", 2)
    monkeypatch.setattr(train_diffusion, "VALIDATION_IMAGES", 2)


def weights(training: Training) -> list[torch.Tensor]:
    return [weight.clone() for weight in training.model.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_the_first_steps_on_whole_canvases_are_masked_and_no_others() -> None:
    masked, plain = MaskedTraining(RECIPE, MASKED), Training("dit-digits", RECIPE)
    for step in range(RECIPE.steps):
        before = weights(masked)
        plain.model.load_state_dict(masked.model.state_dict())
        plain.optimizer.load_state_dict(copy.deepcopy(masked.optimizer.state_dict()))
        masked.advance()
        plain.advance()
        assert masked.model.training == (1 <= step < 1 + MASKED)
        assert equal(weights(masked), weights(plain)) == (not 1 <= step < 1 + MASKED)
        assert not equal(before, weights(masked))


def test_it_goes_on_exactly(tmp_path: Path) -> None:
    whole = MaskedTraining(RECIPE, MASKED)
    for _ in range(RECIPE.steps):
        whole.advance()
    for stop in (1, 2, 3):
        first, second = MaskedTraining(RECIPE, MASKED), MaskedTraining(RECIPE, MASKED)
        for _ in range(stop):
            first.advance()
        first.save(tmp_path / "state.pt")
        torch.manual_seed(99)
        second.resume(tmp_path / "state.pt")
        while second.step < RECIPE.steps:
            second.advance()
        assert equal(weights(second), weights(whole))


def test_the_record_says_what_was_masked(tmp_path: Path) -> None:
    record = train(tmp_path, RECIPE, MASKED)
    assert record["recipe"]["masked"] == {"method": "deferred_masking", "rate": 0.25, "steps": MASKED}
    assert (tmp_path / "dit_digits.safetensors").is_file()


def test_a_step_is_timed_against_unpatched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "small", Case(dit, 1, "deferred_masking", {"keep": 0.25}))
    row = speed("small")
    assert row["promise"] == pytest.approx(3.11, abs=0.01)
    assert float(row["speedup"]) > 1.0  # type: ignore[arg-type]
