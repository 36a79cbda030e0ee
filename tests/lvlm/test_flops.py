"""Multiply-adds of a prefill: what the report says is what a counter sees in the forward, and budgets are met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lvlm_zoo import build, generate, language_model, left_padded, most_in_full, prompt
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenprune


def counted(model: Any, inputs: dict[str, Tensor]) -> int:
    """Multiply-adds of one prefill, attention in eager mode as products that a counter sees; a first one may count."""
    with torch.no_grad():
        model(**inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", most_in_full("qwen2_5_vl"))
def test_the_report_is_what_a_counter_sees(name: str) -> None:
    model, example = build(name, "eager"), prompt(name)
    whole = counted(model, example.inputs)
    inside = (
        [] if name == "gemma3" else [("feather", {"places": (2, 3), "rate": 0.6}), ("pyramid_drop", {"places": (2, 3)})]
    )
    for method, options in [("fopru", {"keep": 0.5}), ("divprune", {"keep": 0.5}), *inside]:
        with tokenprune.patched(model, method, **options):
            left = counted(model, example.inputs)
            said = tokenprune.report(model).to_dict()
        assert said["flops_before"] == whole
        assert abs(said["flops_after"] - left) <= 1e-3 * left
        assert said["flops_ratio"] == pytest.approx(left / whole, rel=1e-3)


@pytest.mark.parametrize("method", most_in_full("top_k", names=("top_k", "divprune", "feather", "fastv")))
@pytest.mark.parametrize("name", ["llava_next", pytest.param("onevision", marks=pytest.mark.full)])
def test_a_flops_budget_is_met_or_the_floor_is_named(name: str, method: str) -> None:
    model, example = build(name, "eager"), prompt(name)
    whole = counted(model, example.inputs)
    with (
        tokenprune.patched(model, method, flops=0.1),
        pytest.raises(tokenprune.BudgetError, match=r"still costs 0\.\d+"),
    ):
        model(**example.inputs)
    with tokenprune.patched(model, method, flops=0.1):
        try:
            model(**example.inputs)
        except tokenprune.BudgetError as error:
            floor = float(str(error).split("use flops=")[1].split(" ")[0])
    for share in (floor, (1 + floor) / 2):
        with tokenprune.patched(model, method, flops=share):
            assert counted(model, example.inputs) / whole == pytest.approx(share, abs=0.01)
            assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(share, abs=0.01)


def test_a_sample_keeps_the_same_tokens_whatever_its_batch_mates_are() -> None:
    model = build("llava_next")
    examples = [prompt("llava_next").inputs, prompt("llava_next", 1, text=9, size=1).inputs]
    with tokenprune.patched(model, "top_k", flops=0.9):
        singles = [generate(model, one) for one in examples]
        together = generate(model, left_padded(examples))
    for row, single in enumerate(singles):
        assert torch.equal(single[0][0], together[0][row])


def test_the_cache_is_what_the_counts_say() -> None:
    model, example = build("llava"), prompt("llava")
    with tokenprune.patched(model, "uniform", tokens=4):
        cache = model(**example.inputs, use_cache=True).past_key_values
    length = example.inputs["input_ids"].shape[1] - 12
    layers = len(language_model(model).layers)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == layers * 2 * length * 2 * 8 * 4  # keys and values, two heads of eight, four bytes
