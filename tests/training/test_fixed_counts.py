"""What learned thresholds come to in the mean, as the same number of tokens in every image."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import images
from learned_thresholds import left, parts
from torch import Tensor, nn

import tokenprune
from tokenprune.stored_schedule import load_schedule

Data = tuple[Tensor, Tensor]


def test_the_mean_numbers_meet_the_budget(model: nn.Module, data: Data, tmp_path: Path) -> None:
    weights = parts(model, [0.6, 0.6, 0.55, 0.55], [0.008, 0.015, 0.015, 0.015])
    tokenprune.patch(model, weights=weights)
    kept = left(model, data[0])
    own = tokenprune.report(model).to_dict()["flops_ratio"]
    tokenprune.unpatch(model)
    found = tokenprune.calibrate(model, data[0], "ltmp", flops=round(own, 2), weights=weights, batch_size=10)
    assert found.method == "ltmp_fixed"
    assert found.found["flops_ratio"] == pytest.approx(own, abs=0.01)
    means = [sum(len(image[place]) for image in kept) / 24 for place in range(4)]
    shares = [mean / entering for entering, mean in zip([35.0, *means], means, strict=False)]
    powers = [math.log(found.schedule[place]) / math.log(share) for place, share in enumerate(shares)]
    assert max(powers) == pytest.approx(min(powers), rel=0.01)
    assert 0.5 < powers[0] < 1.5
    found.save(tmp_path / "fixed.json")
    tokenprune.patch(model, schedule=tmp_path / "fixed.json")
    told = tokenprune.report(model).to_dict()
    assert told["flops_ratio"] == pytest.approx(found.found["flops_ratio"])
    fixed = left(model, data[0])
    assert len({tuple(map(len, image)) for image in fixed}) == 1
    assert load_schedule(tmp_path / "fixed.json").options["dropped"] == found.options["dropped"]
    assert any(0 < share < 1 for share in found.options["dropped"])


def test_without_dropped_tokens_it_is_tome_and_without_merged_ones_the_most_important_stay(model: nn.Module) -> None:
    x = images(model, 3)
    schedule = {1: 0.8, 2: 0.7}
    with torch.no_grad():
        expected = tokenprune.patch(model, "tome", schedule=schedule)(x)
        assert torch.equal(tokenprune.patch(model, "ltmp_fixed", schedule=schedule)(x), expected)
        tokenprune.unpatch(model)
        received: list[Tensor] = []

        def attend(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            q, k, _ = module.qkv(args[0]).reshape(3, 36, 3, 4, 24).permute(2, 0, 3, 1, 4)
            received.append((q @ k.transpose(2, 3) * 24**-0.5).softmax(-1).mean((1, 2))[:, 1:])

        handle = model.blocks[1].attn.register_forward_hook(attend)
        model(x)
        handle.remove()
    tokenprune.patch(model, "ltmp_fixed", schedule={1: 0.6}, dropped=(1.0, 1.0, 1.0, 1.0))
    for image, kept in enumerate(left(model, x)):
        assert sorted(kept[0]) == sorted(received[0][image].topk(21).indices.tolist())


def test_what_is_refused(model: nn.Module, data: Data) -> None:
    with pytest.raises(tokenprune.UnsupportedMethod, match="has to learn"):
        tokenprune.calibrate(model, data[0], "ltmp", flops=0.6)
    with pytest.raises(tokenprune.UnsupportedMethod, match="dropped are shares"):
        tokenprune.patch(model, "ltmp_fixed", dropped=(2.0,))
    weights = parts(model, [0.9] * 4, [0.01] * 4)
    with pytest.raises(tokenprune.BudgetError, match="batch_size must be a whole number of at least 1"):
        tokenprune.calibrate(model, data[0], "ltmp", flops=0.6, weights=weights, batch_size=0)


@pytest.mark.full
def test_a_budget_out_of_reach_names_one_that_is_not(model: nn.Module, data: Data) -> None:
    with pytest.raises(tokenprune.BudgetError, match=r"met by no fixed numbers.*use flops="):
        tokenprune.calibrate(model, data[0], "ltmp", flops=0.2, weights=parts(model, [0.9] * 4, [0.01] * 4))


@pytest.mark.parametrize("dropped", [None, "x", 0.5, ("a", "b"), {"a": 1}, (1.5,), (float("nan"),), (0.5, 0.5)])
def test_shares_that_are_none_or_too_few_are_refused(model: nn.Module, dropped: object) -> None:
    with pytest.raises(tokenprune.UnsupportedMethod, match="dropped"):
        tokenprune.patch(model, "ltmp_fixed", keep=0.5, dropped=dropped)
