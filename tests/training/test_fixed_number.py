"""Learned methods with the same number of tokens in every image: against loops, budgets, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive_learned
import naive_vit
import pytest
import timm
import tiny_models
import torch
import zoo
from compared import assert_same, clear_oracle, recorded
from families import FEW, build, full_but, images, run
from learned_starts import FIXED, MIXING, by_place, random_parts
from torch import nn

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod, UntrainedMethod
from tokenprune.learned_parts import load_learned

SHARES = {1: 0.6, 5: 0.5, 9: 0.4}
POOLED = ("mean_pool", "mean_pool_registers")  # there a dropped token is estimated
CASES = [(m, v) for m in FIXED for v in tiny_models.VARIANTS if m in MIXING or v not in POOLED]
FAST = (*((method, "class_token") for method in FIXED), ("sit", "mean_pool"), ("dynamicvit", "rotary"))


@pytest.mark.parametrize("case", full_but(FAST, CASES), ids=" ".join)
def test_agrees_with_the_loops(case: tuple[str, str]) -> None:
    method, variant = case
    model, reduce = tiny_models.build(variant), getattr(naive_learned, method)
    shares = {1: 0.6} if method == "sinkhorn" else SHARES  # behind one place its mixtures are too much alike
    parts = random_parts(model, method, schedule=shares)
    learned, pooled = by_place(parts), {"weighted_pool": True} if variant in POOLED else {}
    schedule = {block: naive_vit.leaving_share(share) for block, share in shares.items()}
    x, oracle = clear_oracle(model, lambda place: reduce(place, learned), schedule, after_block=True, **pooled)
    tokenprune.patch(model, weights=parts, schedule=shares)
    assert_same(*recorded(model, x), oracle)


@pytest.mark.parametrize("family", full_but(("class_token", "rotary_registers"), (*FEW, "mean_pool")))
@pytest.mark.parametrize("method", FIXED)
def test_budgets_are_met_and_what_is_saved_is_loaded(method: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    x = images(model)
    plain, whole = run(model, x), zoo.count(model, x[:1]).get_total_flops()
    parts = random_parts(model, method, flops=0.75)
    parts = type(parts)(**{**vars(parts), "found": {"flops": 0.75}})
    parts.save(tmp_path)
    tokenprune.patch(model, weights=tmp_path)
    told = tokenprune.report(model).to_dict()
    assert told["budget"] == "flops=0.75"
    assert told["flops_ratio"] == pytest.approx(0.75, abs=0.02)  # of 35 tokens one is about that
    assert zoo.count(model, x[:1]).get_total_flops() / whole == pytest.approx(told["flops_ratio"], abs=0.002)
    reduced = run(model, x)
    assert not torch.allclose(reduced, plain, atol=1e-3)
    assert torch.equal(torch.cat([run(model, one[None]) for one in x]).argmax(1), reduced.argmax(1))
    assert model.forward_features(x).shape == tokenprune.unpatch(build(family)).forward_features(x).shape
    tokenprune.patch(model, weights=load_learned(parts))
    assert torch.equal(run(model, x), reduced)
    assert torch.equal(run(tokenprune.unpatch(model), x), plain)
    if method in MIXING:
        with pytest.raises(BudgetError, match=r"flops=0\.6 is not what these parts were trained for: flops=0\.75"):
            tokenprune.patch(model, method, flops=0.6, weights=parts)
        with pytest.raises(UnsupportedMethod, match="every token is a mixture here"):
            tokenprune.patch(model, weights=parts, restore="regression").forward_features(x)
        tokenprune.unpatch(model)
    else:  # which ranks them for any budget
        tokenprune.patch(model, method, flops=0.6, weights=parts)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(0.6, abs=0.02)
    with pytest.raises(UntrainedMethod, match=f"{method} has to learn for this model first: tokenprune train"):
        tokenprune.patch(model, method, flops=0.75)


@pytest.mark.parametrize("method", FIXED)
def test_on_a_vit_of_usual_size_the_budget_is_met_within_a_hundredth(method: str) -> None:
    """On the meta device, where the weights are shapes."""
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224").eval()
    for flops in (0.6, 0.9):
        tokenprune.patch(model, weights=random_parts(model, method, flops=flops), flops=flops)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(flops, abs=0.01)


@pytest.mark.parametrize("method", MIXING)
def test_mixtures_are_of_the_number_that_was_learned(method: str) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", dynamic_img_size=True, depth=4, embed_dim=48, num_heads=3, img_size=32, patch_size=4
    ).eval()
    parts = random_parts(model, method, flops=0.6)
    tokenprune.patch(model, weights=parts, flops=0.6)
    assert run(model, torch.randn(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(UnsupportedMethod, match=f"{method} has learned to leave .* of 64 tokens, and of an image of 4"):
        model(torch.randn(1, 3, 32, 20))
    with pytest.raises(TokenPruneError, match=f"do not fit {method} in the blocks 0, 1, 2"):
        tokenprune.patch(model, weights=parts, keep=0.2)
    other = {0: 1.0, **dict.fromkeys((1, 2), 0.5)}
    tokenprune.patch(model, weights=random_parts(model, method, schedule=other), schedule=other)
    assert [place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]] == [64, 32, 16]
    with tokenprune.record(model) as recording:
        run(model, torch.randn(1, 3, 32, 32))
    assert recording.forwards[0].places[0].kept.tolist() == [list(range(64))]


def test_predictors_are_for_images_of_any_size_and_every_budget() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", dynamic_img_size=True, depth=4, embed_dim=48, num_heads=3, img_size=32, patch_size=4
    ).eval()
    parts = random_parts(model, "dynamicvit", flops=0.6)
    tokenprune.patch(model, weights=parts, keep=0.3)
    assert run(model, torch.randn(1, 3, 32, 20)).isfinite().all()
    assert tokenprune.report(model).to_dict()["places"][-1]["tokens_out"] == 12


def test_where_they_are_refused() -> None:
    with pytest.raises(UnsupportedMethod, match="dynamicvit masks keys while it learns, and LayerScaleBlock takes no"):
        tokenprune.patch(build("talking_heads"), "dynamicvit", flops=0.6)
    model = build("talking_heads")
    tokenprune.patch(model, weights=random_parts(model, "sit", flops=0.75), flops=0.75)
    assert run(model, images(model)).isfinite().all()
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2)).eval()
    for method in FIXED:
        with pytest.raises(UnsupportedMethod, match="learns for the blocks of an image tower, not within windows"):
            tokenprune.patch(swin, method, keep=0.5)


@pytest.mark.parametrize("method", full_but(("dynamicvit", "sinkhorn", "cropr"), (*FIXED, "tnt", "cropr")))
def test_one_graph_exported_pickled_and_in_half_precision(method: str) -> None:
    model: Any = build("class_token")
    x = images(model, 3)
    tokenprune.patch(model, weights=random_parts(model, method, flops=0.75), flops=0.75)
    expected = run(model, x)
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    half = model.bfloat16()
    assert (run(half, x.bfloat16()).argmax(1) == expected.argmax(1)).float().mean() > 0.5
    assert all(one.dtype == torch.float32 for one in tokenprune.learned(half).parameters())
