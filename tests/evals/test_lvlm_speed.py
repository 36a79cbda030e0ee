"""The timing of vision-language models: each part is what it is called, and the cache is what the tokens make."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from tokenprune.evals import lvlm_speed, random_llava
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.side_by_side import CONTROL, turns

torch.set_num_threads(1)
LAYERS, WIDTH, TEXT, VISUAL, LEFT = 4, 64, 10, 64, 7


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return random_llava.llava(layers=LAYERS, tower_layers=3, width=WIDTH, image=112)


@pytest.fixture(scope="module")
def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    return random_llava.prompt(model, TEXT)


def spent(tokens: int) -> int:
    """Multiply-adds of a language model of one head on so many tokens, and of the last one's logits."""
    layer = tokens * (4 * WIDTH**2 + 3 * WIDTH * 11 * WIDTH // 4) + 2 * tokens**2 * WIDTH
    return LAYERS * layer + WIDTH * 32064


def test_what_comes_behind_the_tower_is_counted_by_its_tokens(model: nn.Module, inputs: dict[str, Any]) -> None:
    assert lvlm_speed.multiply_adds_behind(model, inputs) == spent(VISUAL + TEXT)
    patched = tokenprune.patch(shared_copy(model), "uniform", tokens=LEFT)
    assert lvlm_speed.multiply_adds_behind(patched, inputs) == spent(LEFT + TEXT)


@pytest.mark.parametrize("method", lvlm_speed.METHODS)
def test_the_cache_is_what_the_tokens_in_each_layer_make(model: nn.Module, inputs: dict[str, Any], method: str) -> None:
    patched: Any = tokenprune.patch(shared_copy(model), method, tokens=LEFT)
    seen: list[int] = []
    for layer in patched.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
    held = lvlm_speed.cache_bytes(patched, inputs)
    assert held == 2 * WIDTH * 4 * sum(seen)  # keys and values, four bytes
    assert held == lvlm_speed.counted_bytes(patched, inputs)
    assert seen[-1] == TEXT + LEFT
    behind_the_tower = method in lvlm_speed.BEHIND_THE_TOWER
    assert seen[0] == TEXT + (LEFT if behind_the_tower else VISUAL)


def test_hooks_that_are_there_before_are_outside_of_the_parts(model: nn.Module, inputs: dict[str, Any]) -> None:
    slow: Any = shared_copy(model)
    slow.model.vision_tower.register_forward_hook(lambda *_: time.sleep(0.2))
    slow.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    laps = lvlm_speed.Laps(slow).of(partial(random_llava.generate, slow, inputs, 3))
    assert max(laps["tower"], laps["prefill"]) < 0.1
    assert laps["between"] > 0.3
    assert laps["behind"] == pytest.approx(laps["between"] + laps["prefill"])
    assert laps["first_token"] == pytest.approx(laps["behind"] + laps["tower"])
    assert 0.1 < laps["decode"] < 0.2


def test_the_table(model: nn.Module, inputs: dict[str, Any]) -> None:
    table = lvlm_speed.speed_table(model, ("uniform", "fastv"), tokens=LEFT, text=TEXT, answer=2, attempts=1)
    whole, *rows = table.rows
    assert [row["method"] for row in table.rows] == ["unpatched", "uniform", "fastv"]
    assert all(row["as_counted"] is True for row in rows)
    assert whole["cache_mb"] == LAYERS * 2 * WIDTH * 4 * (VISUAL + TEXT) / 2**20
    assert rows[0]["promised"] == pytest.approx(spent(VISUAL + TEXT) / spent(LEFT + TEXT))
    assert all(0 < row["tower"] < row["first_token"] for row in table.rows)
    assert table.environment["visual tokens"] == VISUAL


def test_every_way_has_every_place_in_a_round() -> None:
    orders = turns(["a", "b", CONTROL], 24)
    for name in ("a", "b", CONTROL):
        assert sorted(order.index(name) for order in orders) == sorted([0, 1, 2] * 8)
    assert ["a", "b", CONTROL] in orders
    assert [CONTROL, "b", "a"] in orders
