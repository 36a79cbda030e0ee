"""Pruning one more token against an oracle written from the paper."""

from __future__ import annotations

import naive_pomt
import naive_vit
import pytest
import tiny_models
from compared import assert_same, clear_oracle, recorded

import tokenprune

# What rotary row a fused token has is the package's own choice.
VARIANTS = [
    pytest.param(variant, marks=[] if variant in ("class_token", "mean_pool_registers") else pytest.mark.full)
    for variant in tiny_models.VARIANTS
    if variant != "rotary"
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str) -> None:
    """At three places, of which the last two have a fused token already."""
    model, shares = tiny_models.build(variant), {2: 0.7, 5: 0.75, 10: 0.6}
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    x, oracle = clear_oracle(model, naive_pomt.pomt, schedule)
    tokenprune.patch(model, "pomt", schedule=shares)
    assert_same(*recorded(model, x), oracle)


def test_r_tokens_go_at_block_three() -> None:
    model = tiny_models.build("class_token")
    x, oracle = clear_oracle(model, naive_pomt.pomt, {3: naive_vit.leaving_less(9)})
    tokenprune.patch(model, "pomt", r=9)
    logits, passages = recorded(model, x)
    assert_same(logits, passages, oracle)
    assert len(passages[0][3].kept) == 26
    tokenprune.patch(model, "pomt", tokens=20, places=(-2,))
    assert [list(image) for image in recorded(model, x)[1]] == 3 * [[10]]
    with pytest.raises(tokenprune.BudgetError, match="r=56 of 35 tokens cannot be removed; use r=11"):
        tokenprune.patch(model, "pomt")
    with pytest.raises(tokenprune.BudgetError, match="one place"):
        tokenprune.patch(model, "pomt", r=9, places=(3, 6))
