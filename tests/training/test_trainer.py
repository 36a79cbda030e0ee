"""The trainer: what it learns, a kill and what follows it, and that the model and the process are left as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from learned_thresholds import left
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import tokenprune
from tokenprune.evals.data import ImageData
from tokenprune.training import train
from tokenprune.training.sampling import ByTurn, Order
from tokenprune.training.state import FILE

QUICK = {"flops": 0.6, "batch_size": 4, "epochs": 2, "learning_rate": 0.02, "save_every": 2}
Data = tuple[Tensor, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:what was learned costs")


class Killed(Exception):
    pass


class Deadly(Dataset[tuple[Tensor, int]]):
    """Images of which reading the `last`-th one more kills, as a random augmentation sees them."""

    def __init__(self, data: Data, last: int) -> None:
        self.data, self.left = data, last

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return self.data[0][index] + 0.1 * torch.randn(3, 1, 1), int(self.data[1][index])


def drawn(data: Data, last: int = -1) -> ImageData:
    return ImageData("drawn", Deadly(data, last), 24, 5)


def test_thresholds_move_towards_the_budget_and_the_model_is_left_alone(model: nn.Module, data: Data) -> None:
    model.train()
    model.blocks[0].requires_grad_(False)
    before, hooks = copy.deepcopy(model.state_dict()), len(model._forward_hooks)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    found = train(model, data, flops=0.6, batch_size=8, epochs=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert len(model._forward_hooks) == hooks
    assert found.found["steps"] == 18
    assert found.found["flops_ratio"] == pytest.approx(0.6, abs=0.06)
    tokenprune.patch(model.eval(), weights=found)
    with torch.no_grad():
        model(data[0])
    assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(found.found["flops_ratio"], abs=1e-6)
    assert len({len(image[-1]) for image in left(model, data[0])}) > 1


FULL = pytest.mark.full


@pytest.mark.parametrize("last", [pytest.param(29, marks=FULL), 38, pytest.param(55, marks=FULL)])
@pytest.mark.parametrize("method", ["ltmp", "dynamicvit", pytest.param("sinkhorn", marks=FULL)])
def test_a_killed_training_goes_on_bit_by_bit(
    model: nn.Module, data: Data, tmp_path: Path, method: str, last: int, short: None
) -> None:
    """With an optimiser that has a state, random augmentation and decisions, and a kill in the middle of either
    epoch. Eight images are read before the first step."""
    options = {**QUICK, "opt": "adamw", "method": method}
    whole = train(model, drawn(data), output=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        train(model, drawn(data, last), output=tmp_path / "killed", **options)
    (tmp_path / "killed" / (FILE + ".partial")).write_bytes(b"cut off by the kill")
    resumed = train(model, drawn(data), output=tmp_path / "killed", **options)
    assert resumed.found == whole.found
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor)
        assert not (tensor == 0.9).any()  # where the thresholds of ltmp start
    first, second = (load_file(tmp_path / folder / FILE) for folder in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first[".history"]) == 12


def test_a_finished_training_is_not_repeated(model: nn.Module, data: Data, tmp_path: Path, short: None) -> None:
    found = train(model, data, output=tmp_path, **QUICK)
    again = train(model, data, output=tmp_path, **QUICK)
    assert again.found == found.found
    with pytest.raises(tokenprune.TokenPruneError, match=r"batch_size 4 and not 8.*--output of its own"):
        train(model, data, output=tmp_path, **{**QUICK, "batch_size": 8})


def test_processes_share_a_batch_and_a_start_passes_over_what_was_taken() -> None:
    whole = list(Order(20, 6, 3, 2, seed=4, process=0, processes=1))
    parts = [list(Order(20, 3, 3, 2, seed=4, process=p, processes=2)) for p in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert len({image for batch in whole[:3] for _, image in batch}) == 18
    assert [image for batch in whole[:3] for _, image in batch] != [image for batch in whole[3:] for _, image in batch]
    late = Order(20, 6, 3, 2, seed=4, process=0, processes=1)
    late.start = 4
    assert list(late) == whole[4:]
    assert len(late) == 2


def test_an_augmentation_depends_on_the_turn_alone(data: Data) -> None:
    items = ByTurn(Deadly(data, -1), seed=3)
    state = torch.get_rng_state()
    first = items[1, 5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(items[1, 5][0], first)
    assert not torch.equal(items[0, 5][0], first)
    assert not torch.equal(ByTurn(Deadly(data, -1), seed=4)[1, 5][0], first)


def test_accumulated_batches_make_one_step(model: nn.Module, data: Data, short: None) -> None:
    """Where all images are alike, two batches of two are one of four; the budget's loss is each batch's own."""
    x, y = data[0][:1].expand(8, -1, -1, -1), data[1][:1].expand(8)
    options = {"flops": 0.6, "epochs": 2, "learning_rate": 0.02}
    whole = train(model, (x, y), batch_size=4, **options)
    parts = train(model, (x, y), batch_size=2, accumulate=2, **options)
    assert parts.found["steps"] == whole.found["steps"] == 4
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_bfloat16_and_another_precision_later(model: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    with pytest.raises(tokenprune.TokenPruneError, match="mixed_precision='fp12'"):
        train(model, data, mixed_precision="fp12", **QUICK)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    found = train(model, data, mixed_precision="bf16", **{**QUICK, "epochs": 1})
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors.values())
    with pytest.raises(tokenprune.TokenPruneError, match=r"mixed_precision='no': .* already been initialized"):
        train(model, data, mixed_precision="no", **QUICK)
