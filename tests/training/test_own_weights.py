"""Training of the model's own weights beside what a method learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, run
from learned_starts import random_parts
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenprune
from tokenprune import TokenPruneError
from tokenprune.learned_parts import load_learned
from tokenprune.training import train
from tokenprune.training.distillation import twin

Data = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"flops": 0.6, "batch_size": 4, "epochs": 1, "save_every": 2, "opt": "adamw"}


def test_they_move_and_are_written_with_what_is_learned(model: nn.Module, data: Data, tmp_path: Path) -> None:
    model.head.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    hooks, asked = len(model._forward_hooks), [one.requires_grad for one in model.parameters()]
    found = train(model, data, "dynamicvit", model_rate=1e-4, output=tmp_path, **QUICK)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(moved) == sorted(name for name, one in model.named_parameters() if not name.startswith("head."))
    assert found.found["model_rate"] == 1e-4
    assert [one.requires_grad for one in model.parameters()] == asked
    assert all(one.grad is None for one in model.parameters())
    assert len(model._forward_hooks) == hooks
    fresh = build("class_token")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert load_learned(tmp_path).norms == found.norms != random_parts(build("class_token"), "sit", flops=0.6).norms
    outputs = [run(tokenprune.patch(one, weights=tmp_path), data[0]) for one in (model, fresh)]
    assert torch.equal(*outputs)


def test_a_training_in_two_halves_is_a_whole_one(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a NaN behind its first state, with the teacher that it began with."""
    results = []
    for folder, broken in (("whole", False), ("halves", True)):
        model = build("class_token")
        if broken:
            from tokenprune.training.sampling import Order

            fourth = list(Order(24, 4, 6, 1, seed=0, process=0, processes=1))[3]
            spoiled = data[0].clone()
            spoiled[fourth[0][1]] = float("nan")
            with pytest.raises(TokenPruneError, match="is that of step 2"):
                train(model, (spoiled, data[1]), "dynamicvit", model_rate=1e-3, output=tmp_path / folder, **QUICK)
            model = build("class_token")
        found = train(model, data, "dynamicvit", model_rate=1e-3, output=tmp_path / folder, **QUICK)
        results.append((found, model.state_dict()))
    (whole, weights), (halves, others) = results
    assert halves.found == whole.found
    assert all(torch.equal(halves.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert all(torch.equal(others[name], weights[name]) for name in weights)


def test_the_teacher_is_what_the_model_was(model: nn.Module, data: Data) -> None:
    plain = run(model, data[0])
    tokenprune.patch(model, "top_k", keep=0.5)
    teacher = twin(model)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(run(teacher, data[0]), plain)
    assert not any(one.requires_grad for one in teacher.parameters())
    assert tokenprune.report(model).to_dict()["method"] == "top_k"


def test_a_rate_is_no_negative_number(model: nn.Module, data: Data) -> None:
    with pytest.raises(TokenPruneError, match=r"model_rate must be a number of at least 0, got -1; for example model"):
        train(model, data, "dynamicvit", model_rate=-1, **QUICK)
