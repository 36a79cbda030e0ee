"""Wrong input is either right or a clear error, and the model still works afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel

METHODS = ["random", "uniform", "top_k", "evit", "tome", "zero_tprune", "zero_tprune_uni"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=80, embed_dim=48, num_heads=3, depth=6, num_classes=7)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
    return model.eval()


@pytest.fixture
def works(model: nn.Module) -> Iterator[nn.Module]:
    """The model, checked afterwards: it still patches, runs and comes back bit by bit."""
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        before = model(images)
    yield model
    with torch.no_grad():
        tokenprune.unpatch(model)
        assert torch.equal(model(images), before)
        tokenprune.patch(model, "tome", flops=0.6)
        assert model(images).isfinite().all()
        tokenprune.unpatch(model)
        assert torch.equal(model(images), before)


BAD_BUDGETS: list[dict[str, Any]] = [
    {"keep": 0},
    {"keep": 0.0},
    {"keep": 1.7},
    {"keep": -0.5},
    {"keep": "0.5"},
    {"keep": True},
    {"keep": float("nan")},
    {"flops": 0},
    {"flops": 2},
    {"flops": "half"},
    {"tokens": 0},
    {"tokens": 3.5},
    {"tokens": 26},
    {"tokens": "8"},
    {"schedule": {}},
    {"schedule": {99: 0.5}},
    {"schedule": {"nowhere": 0.5}},
    {"schedule": {3: 0}},
    {"schedule": [0.5]},
    {"keep": 0.5, "flops": 0.5},
    {"keep": 0.999},
    {"flops": 0.01},
]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=str)
def test_a_wrong_budget(works: nn.Module, budget: dict[str, Any]) -> None:
    with pytest.raises(BudgetError):
        tokenprune.patch(works, "top_k", **budget)
    with pytest.raises(UnsupportedModel, match="patched"):
        tokenprune.report(works)


def test_an_unreachable_budget_names_what_can_be_reached(works: nn.Module) -> None:
    with pytest.raises(BudgetError, match=r"flops=0\.\d\d") as caught:
        tokenprune.patch(works, "top_k", flops=0.1)
    floor = float(str(caught.value).rsplit("flops=", 1)[1].split()[0])
    tokenprune.patch(works, "top_k", flops=floor)
    assert tokenprune.report(works).to_dict()["flops_ratio"] == pytest.approx(floor, abs=0.02)


def test_a_failed_patch_leaves_the_earlier_one(works: nn.Module) -> None:
    images = torch.randn(1, 3, 80, 80)
    tokenprune.patch(works, "tome", flops=0.6)
    before = works(images)
    with pytest.raises(BudgetError):
        tokenprune.patch(works, "tome", flops=0.01)
    assert torch.equal(works(images), before)
    assert tokenprune.report(works).to_dict()["method"] == "tome"


@pytest.mark.parametrize(
    ("method", "options"),
    [("tomee", {}), (3, {}), ("tome", {"rr": 3}), ("top_k", {"rate": 2.0}), ("tome", {"r": -1}), ("tome", {"r": 24})],
    ids=str,
)
def test_a_wrong_method_or_option(works: nn.Module, method: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TokenPruneError):
        tokenprune.patch(works, method, **options)


def test_options_need_a_method(works: nn.Module) -> None:
    with pytest.raises(UnsupportedMethod):
        tokenprune.patch(works, rate=0.5)


@pytest.mark.parametrize(
    "target", [nn.Linear(2, 2), timm.create_model("resnet18"), "vit", None], ids=lambda t: type(t).__name__
)
def test_an_unknown_model(target: Any) -> None:
    with pytest.raises(UnsupportedModel):
        tokenprune.patch(target, flops=0.6)


def test_an_unknown_block_is_refused_and_named(model: nn.Module) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model.blocks[2] = Odd()
    with pytest.raises(UnsupportedModel, match="Odd"):
        tokenprune.patch(model, flops=0.6)
    assert model(torch.randn(1, 3, 80, 80)).shape == (1, 7)


def test_scripts_and_traces(works: nn.Module) -> None:
    scripted = torch.jit.script(timm.create_model("test_vit", scriptable=True).eval())
    with pytest.raises(UnsupportedModel, match="TorchScript"):
        tokenprune.patch(scripted, flops=0.6)
    tokenprune.patch(works, "top_k", flops=0.6)
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        expected = works(images)
        traced = torch.jit.trace(works, images, check_trace=False)
        torch.testing.assert_close(traced(images), expected)


@pytest.mark.parametrize("method", METHODS)
def test_nan_stays_with_its_image(works: nn.Module, method: str) -> None:
    images = torch.randn(3, 3, 80, 80)
    broken = images.clone()
    broken[1] = float("nan")
    tokenprune.patch(works, method, flops=0.6)
    with torch.no_grad():
        good, bad = works(images), works(broken)
    assert bad[1].isnan().all()
    torch.testing.assert_close(bad[[0, 2]], good[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_none_and_of_one(works: nn.Module, method: str) -> None:
    images = torch.randn(3, 3, 80, 80)
    tokenprune.patch(works, method, flops=0.6)
    state = torch.get_rng_state()
    with torch.no_grad():
        together = works(images)
        assert works(images[:0]).shape == (0, 7)
        for i in range(3):
            torch.testing.assert_close(works(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(works(images), together)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_of_another_size_raises_and_leaves_the_model_usable(works: nn.Module) -> None:
    tokenprune.patch(works, "tome", flops=0.6)
    for size in (8, 96):
        with pytest.raises(AssertionError):
            works(torch.randn(1, 3, size, size))


def test_an_image_of_one_patch() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, embed_dim=48, num_heads=3, depth=3).eval()
    with pytest.raises(BudgetError):
        tokenprune.patch(model, "top_k", flops=0.6)
    tokenprune.patch(model, "top_k", keep=1.0)
    assert model(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_the_callers_mask_is_refused(works: nn.Module) -> None:
    tokenprune.patch(works, "top_k", flops=0.6)
    images = torch.randn(1, 3, 80, 80)
    for arguments in ({"is_causal": True}, {"attn_mask": torch.ones(26, 26, dtype=torch.bool)}):
        with pytest.raises(UnsupportedModel, match="mask"):
            works(images, **arguments)


def test_symbolic_tracing_is_refused_with_a_reason(works: nn.Module) -> None:
    tokenprune.patch(works, "top_k", flops=0.6)
    with pytest.raises(UnsupportedModel, match="symbolic"):
        torch.fx.symbolic_trace(works)
