"""Training of a model's own weights alone: sparsity-aware adaptation through the one trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from windows_zoo import SIZES, build, images

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel, cli
from tokenprune.evals.models import load_model
from tokenprune.training import train
from tokenprune.training.sampling import Order

QUICK: dict[str, Any] = {"adapt": 0.8, "batch_size": 4, "epochs": 2, "save_every": 2, "model_rate": 1e-3, "seed": 3}


def data() -> tuple[Tensor, Tensor]:
    """12 images and labels."""
    return images(SIZES[0], 12), torch.arange(12) % build().num_classes


def test_steps_are_those_of_a_loop_with_the_same_shares(tmp_path: Path) -> None:
    """The loop: patched, in training mode, cross-entropy, gradient descent at one rate."""
    inputs, labels = data()
    model, looped = build(), build()
    found = train(model, (inputs, labels), "sparsevit", opt="momentum", sched="step", output=tmp_path, **QUICK)
    tokenprune.patch(looped, "sparsevit", adapt=0.8).train()
    optimizer = torch.optim.SGD(looped.parameters(), lr=1e-3, weight_decay=0.05)
    torch.manual_seed(3)
    for batch in Order(12, 4, 3, 2, seed=3, process=0, processes=1):
        numbers = [number for _, number in batch]
        loss = F.cross_entropy(looped(inputs[numbers]), labels[numbers])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = tokenprune.unpatch(looped).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
    assert found.found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not found.tensors
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    record = json.loads((tmp_path / "model.json").read_text())
    assert (record["method"], record["options"], record["found"]) == ("sparsevit", {"adapt": 0.8}, found.found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors", "state.safetensors"]


def test_all_but_the_weights_is_as_it_was() -> None:
    model = build()
    model.layers[0].train()
    model.head.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    asked, state = [one.requires_grad for one in model.parameters()], torch.get_rng_state()
    train(model, data(), "sparsevit", **QUICK)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(name.startswith("head.") for name in moved)
    assert [module.training for module in model.modules()] == modes
    assert [one.requires_grad for one in model.parameters()] == asked
    assert all(one.grad is None for one in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    tokenprune.patch(model, "sparsevit", flops=0.8)  # nothing of the training is on it


def test_a_training_in_two_halves_is_a_whole_one(tmp_path: Path) -> None:
    """Stopped by a NaN behind its first state; the shares of the other steps are drawn as if it had not been."""
    inputs, labels = data()
    fourth = list(Order(12, 4, 3, 2, seed=3, process=0, processes=1))[3]
    spoiled = inputs.clone()
    spoiled[fourth[0][1]] = float("nan")
    torch.manual_seed(8)
    whole, halves = build(), build()
    train(whole, (inputs, labels), "sparsevit", output=tmp_path / "whole", **QUICK)
    with pytest.raises(TokenPruneError, match=r"is nan for the task, and the training stops"):
        train(build(), (spoiled, labels), "sparsevit", output=tmp_path / "halves", **QUICK)
    train(halves, (inputs, labels), "sparsevit", output=tmp_path / "halves", **QUICK)
    assert all(torch.equal(value, halves.state_dict()[name]) for name, value in whole.state_dict().items())
    written = [(tmp_path / name / "model.json").read_text() for name in ("whole", "halves")]
    assert written[0] == written[1]


def test_what_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedMethod, match="sparsevit learns nothing"):
        train(build(), data(), "sparsevit", flops=0.6)
    with pytest.raises(BudgetError, match="draws what each training step leaves out itself"):
        train(build(), data(), "sparsevit", flops=0.6, **QUICK)
    with pytest.raises(UnsupportedMethod, match="leave them out"):
        train(build(), data(), "sparsevit", distill_logits=0.5, **QUICK)
    with pytest.raises(TokenPruneError, match="model_rate=0"):
        train(build(), data(), "sparsevit", **{**QUICK, "model_rate": 0})
    with pytest.raises(UnsupportedModel, match="model of windows"):
        train(model, data(), "sparsevit", **QUICK)
    with pytest.raises(BudgetError, match="flops must be a share"):
        train(model, data())


def test_the_command_on_the_shipped_swin(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["train", "digits-swin", "--method", "sparsevit", "--option", "adapt=0.8", "--samples", "8", "--quiet"]
    assert cli.main([*arguments, "--batch-size", "4", "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "2 steps: loss" in capsys.readouterr().out
    shipped = load_model("digits-swin").model
    stored = load_file(tmp_path / "model.safetensors")
    assert any(not torch.equal(stored[name], value) for name, value in shipped.state_dict().items())
    shipped.load_state_dict(stored)
