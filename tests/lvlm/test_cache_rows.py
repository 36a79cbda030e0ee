"""Operations on the rows of a pruned cache: what is known of its entries goes with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lvlm_zoo import build, left_padded, prompt
from torch import Tensor

import tokenprune

ROWS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "exchanged": (lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
    "fewer": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "more": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "beams": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
}


def asked(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The cache of a left-padded batch of two prompts, and what is said next."""
    batch = left_padded([prompt("llava").inputs, prompt("llava", 1, images=2, text=9).inputs])
    with torch.no_grad():
        cache = model(**batch, past_key_values=transformers.DynamicCache()).past_key_values
    turn = {"input_ids": torch.tensor([[31, 32, 33], [34, 35, 36]])}
    turn["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    return cache, turn


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "method", ["feather", "uniform", *(pytest.param(m, marks=pytest.mark.full) for m in ("fastv", "pyramid_drop"))]
)
def test_rows_of_a_cache_are_chosen(method: str, attention: str) -> None:
    model = build("llava", attention)
    tokenprune.patch(model, method, keep=0.25)
    cache, turn = asked(model)
    with torch.no_grad():
        expected = model(**turn, past_key_values=copy.deepcopy(cache)).logits
        for change, rows in ROWS.values():
            other = copy.deepcopy(cache)
            change(other)
            mine = model(**{key: value[rows] for key, value in turn.items()}, past_key_values=other).logits
            torch.testing.assert_close(mine, expected[rows], rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


def test_a_cache_that_lost_tokens_between_layers_goes_on_without_its_patch() -> None:
    """Later layers have fewer entries than the masks, which are made for the first."""
    model = build("llava")
    with tokenprune.patched(model, "feather", keep=0.25):
        cache, turn = asked(model)
    with pytest.raises(tokenprune.UnsupportedModel, match="goes on without it"):
        model(**turn, past_key_values=copy.deepcopy(cache))
    for other, reason in (("uniform", "goes on without it"), ("fastv", "another patch")):
        with tokenprune.patched(model, other, keep=0.25), pytest.raises(tokenprune.UnsupportedModel, match=reason):
            model(**turn, past_key_values=copy.deepcopy(cache))
    cache.reset()
    assert type(cache) is transformers.DynamicCache
    assert "_tokenprune" not in str(vars(cache))
    plain = model(**turn | {"attention_mask": torch.ones(2, 3, dtype=torch.long)}, past_key_values=cache).logits
    assert torch.equal(plain, model(input_ids=turn["input_ids"]).logits)
