"""Distillation: its losses against loops, and how a training is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive_learned
import pytest
import torch
from families import build, images
from learned_thresholds import parts, patch_of
from torch import Tensor, nn

import tokenprune
from tokenprune import TokenPruneError, UnsupportedMethod
from tokenprune.training import train
from tokenprune.training.distillation import logits_divergence, token_error, unpatched

Data = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"flops": 0.6, "batch_size": 8, "epochs": 1}
pytestmark = [pytest.mark.filterwarnings("ignore:what was learned costs"), pytest.mark.usefixtures("short")]


def test_losses_are_those_of_the_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 6, generator=generator) for _ in range(2))
    expected = sum(naive_learned.divergence(a, b) for a, b in zip(student, teacher, strict=True)) / 4
    assert logits_divergence(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    assert logits_divergence(student, student).item() == pytest.approx(0.0, abs=1e-7)
    tokens, given = (5 * torch.randn(2, 7, 12, generator=generator) for _ in range(2))
    alive = (torch.rand(2, 7, generator=generator) > 0.4).float()
    kept = [one > 0 for one in alive.flatten().tolist()]
    expected = naive_learned.token_loss(list(tokens.flatten(0, 1)), list(given.flatten(0, 1)), kept)
    assert token_error(tokens, given, alive).item() == pytest.approx(expected.item(), rel=1e-4)
    assert token_error(tokens, given, torch.zeros_like(alive)).item() == 0.0


def test_the_teacher_is_the_unpatched_model(model: nn.Module) -> None:
    x = images(model)
    with torch.no_grad():
        plain = model(x)
        tokenprune.patch(model, weights=parts(model, [0.6] * 4, [0.01] * 4))
        patched = model(x)
        with unpatched(patch_of(model)):
            assert torch.equal(model(x), plain)
        with pytest.raises(AssertionError), unpatched(patch_of(model)):
            model(x[:, :, :-1])
        assert torch.equal(model(x), patched)
    assert not torch.equal(patched, plain)


def test_weights_are_of_the_recipe_or_asked_for(model: nn.Module, data: Data, tmp_path: Path) -> None:
    plain = train(model, data, **QUICK)
    taught = train(model, data, output=tmp_path, distill_logits=0.5, distill_tokens=0.25, **QUICK)
    assert "distill_logits" not in plain.found
    assert (taught.found["distill_logits"], taught.found["distill_tokens"]) == (0.5, 0.25)
    assert taught.found["loss"] > plain.found["loss"]
    assert any(not torch.equal(plain.tensors[name], taught.tensors[name]) for name in plain.tensors)
    with pytest.raises(TokenPruneError, match=r"distill_tokens 0\.25 and not 0\.0"):
        train(model, data, output=tmp_path, distill_logits=0.5, **QUICK)
    own = train(model, data, "dynamicvit", **QUICK)
    assert (own.found["distill_logits"], own.found["distill_tokens"]) == (0.5, 0.5)
    assert "distill_tokens" not in train(model, data, "dynamicvit", distill_tokens=0.0, **QUICK).found
    assert train(model, data, "sit", distill_logits=0.5, **QUICK).found["distill_logits"] == 0.5


def test_what_is_refused(model: nn.Module, data: Data) -> None:
    with pytest.raises(UnsupportedMethod, match="sit masks none; distill_logits= works"):
        train(model, data, "sit", distill_tokens=0.5, **QUICK)
    with pytest.raises(UnsupportedMethod, match="a teacher of a frozen model would change nothing"):
        train(model, data, "cropr", distill_logits=0.5, **QUICK)
    assert train(model, data, "cropr", distill_logits=0.5, model_rate=1e-5, **QUICK).found["distill_logits"] == 0.5
    for wrong in (-1, float("nan"), "half", True):
        with pytest.raises(TokenPruneError, match="distill_logits must be a number of at least 0"):
            train(model, data, distill_logits=wrong, **QUICK)
    with pytest.raises(tokenprune.BudgetError, match="leaves nothing out, and dynamicvit has nothing to learn"):
        train(model, data, "dynamicvit", flops=1.0)
    with pytest.raises(tokenprune.BudgetError, match="one budget at most"):
        train(model, data, "dynamicvit", rate=0.5, **QUICK)
    with pytest.raises(UnsupportedMethod, match="masks keys while it learns"):
        train(build("talking_heads"), data, "dynamicvit", **QUICK)
