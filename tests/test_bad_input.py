"""Wrong input is either right or a clear error, and the model still works afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lvlm_zoo
import pytest
import timm
import torch
from families import METHODS, build
from torch import Tensor, nn

import tokenprune
from tokenprune import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel


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


OWN_BUDGETS = [pytest.param("tome", "r", 2)] + [
    pytest.param(name, "rate", 0.7, marks=[] if name in ("top_k", "ats") else pytest.mark.full)
    for name in ("random", "uniform", "top_k", "evit", "zero_tprune", "zero_tprune_uni", "ats")
]


@pytest.mark.parametrize(("method", "option", "value"), OWN_BUDGETS)
@pytest.mark.parametrize("other", [{"flops": 0.6}, {"keep": 0.5}, {"tokens": 9}, {"schedule": {3: 0.5}}], ids=str)
def test_a_methods_own_option_is_a_budget(
    works: nn.Module, method: str, option: str, value: float, other: dict[str, Any]
) -> None:
    ((kind, given),) = other.items()
    with pytest.raises(BudgetError, match="one budget at most") as caught:
        tokenprune.patch(works, method, **{option: value}, **other)
    assert f"{kind}={given!r} and {option}={value!r}" in str(caught.value)
    with pytest.raises(UnsupportedModel, match="patched"):
        tokenprune.report(works)
    if (method, kind) != ("ats", "flops"):  # which an adaptive method cannot meet
        tokenprune.patch(works, method, **{option: None}, **other)
        assert tokenprune.report(works).to_dict()["budget"] == f"{kind}={given}"


@pytest.mark.parametrize(("method", "option", "value"), OWN_BUDGETS)
def test_a_methods_own_budget_alone_is_reported_and_none_is_the_default(
    works: nn.Module, method: str, option: str, value: float
) -> None:
    info = next(info for info in tokenprune.methods() if info.name == method)
    assert info.own_budget == option
    assert info.options[option] == {"tome": 8, "ats": 1.0, "zero_tprune": 0.9, "zero_tprune_uni": 0.9}.get(method, 0.7)
    tokenprune.patch(works, method, **{option: value})
    assert tokenprune.report(works).to_dict()["budget"] == f"{option}={value}"
    if method != "tome":  # whose published r is too many for 25 tokens
        tokenprune.patch(works, method, **{option: None})
        assert tokenprune.report(works).to_dict()["budget"] == "the method's published default"


@pytest.mark.parametrize(("method", "option", "value"), OWN_BUDGETS)
@pytest.mark.parametrize("wrong", [0, 1.7, 2.5, -1, True, "x", float("nan"), [1]], ids=str)
def test_an_own_budget_out_of_range_names_one_that_works(
    works: nn.Module, method: str, option: str, value: float, wrong: Any
) -> None:
    if (option, wrong) == ("r", 0):
        return  # none merged in every block, as asked
    with pytest.raises(BudgetError, match=rf"{option} must be .* got .*; for example {option}=[\d.]+$"):
        tokenprune.patch(works, method, **{option: wrong})


def test_a_share_that_keeps_every_token_is_refused_and_names_one_that_does_not(works: nn.Module) -> None:
    for arguments in ({"rate": 0.999}, {"keep": 0.999}, {"schedule": {2: 0.999, 4: 1.0}}):
        with pytest.raises(BudgetError, match=r"0\.960"):
            tokenprune.patch(works, "top_k", **arguments)
    tokenprune.patch(works, "top_k", keep=0.96)
    assert tokenprune.report(works).to_dict()["places"][-1]["tokens_out"] == 24


@pytest.mark.parametrize("places", [(), 3, "3", (1.5,), (True,), (99,)], ids=str)
@pytest.mark.parametrize(("method", "budget"), [("top_k", {"keep": 0.5}), ("tome", {"r": 2})])
def test_wrong_places(works: nn.Module, method: str, budget: dict[str, Any], places: Any) -> None:
    with pytest.raises(BudgetError, match="block"):
        tokenprune.patch(works, method, places=places, **budget)


def test_a_schedule_names_each_place_once_and_leaves_no_room_for_places(works: nn.Module) -> None:
    with pytest.raises(BudgetError, match="leave out places"):
        tokenprune.patch(works, "top_k", places=(2,), schedule={3: 0.5})
    for twice in ({1: 0.5, -5: 0.7}, {"blocks.1": 0.5, 1: 0.7}):
        with pytest.raises(BudgetError, match="block 1 twice"):
            tokenprune.patch(works, "top_k", schedule=twice)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *[("zero_tprune", {"iterations": value}) for value in (0, -1, 2.5, True, "x", {0: 0}, {99: 3})],
        *[("zero_tprune", {"similarity": value}) for value in (-1, 2.0, (2.0, 0.5), True, "x")],
        *[("zero_tprune", {"variance": value}) for value in (0.5, (1, 0), "x")],
        *[("random", {"seed": value}) for value in ("x", 1.5, None)],
        ("zero_tprune", {"class_start": "no"}),
        ("tome", {"proportional": 0}),
        *[("adaptive_tome", {"threshold": value}) for value in ("x", float("nan"), [0.9], True)],
        *[("saint", {"threshold": value}) for value in ("0.75", None)],
        *[("saint", {"gamma": value}) for value in ("x", float("inf"))],
        *[("algm", {"threshold": value}) for value in ("x", float("inf"))],
        *[("pitome", {"margin": value}) for value in ("x", float("inf"), None)],
    ],
    ids=str,
)
def test_a_value_that_an_option_does_not_take(works: nn.Module, method: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedMethod, match=next(iter(options))):
        tokenprune.patch(works, method, keep=0.5, **options)


@pytest.mark.parametrize("kept", [5, "x", (3, 2), ((5, "x"), (5, 4)), ((5, 4), (5,)), ((5, 4), 3)], ids=str)
def test_rates_that_are_no_two_lists(works: nn.Module, kept: Any) -> None:
    with pytest.raises(BudgetError, match="two lists"):
        tokenprune.patch(works, "diffrate", kept=kept)


@pytest.mark.parametrize("method", ["algm", "saint", "zero_tprune", "pomt"])
def test_places_that_are_no_row(works: nn.Module, method: str) -> None:
    with pytest.raises(BudgetError, match="place"):
        tokenprune.patch(works, method, places=5)


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
        tokenprune.patch(works, "zero_tprune", flops=0.6)
        with pytest.raises(UnsupportedMethod, match=r"cannot be traced by torch\.jit"):
            torch.jit.trace(works, images, check_trace=False)


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


@pytest.mark.parametrize(("family", "method"), [("talking_heads", "top_k"), ("class_token", "pomt")])
def test_a_batch_of_none_where_parts_are_split(family: str, method: str) -> None:
    """Queries and keys out of one projection, and values (BEiT and EVA themselves take no batch of none)."""
    model = build(family)
    x = torch.randn(0, 3, *model.pretrained_cfg["input_size"][-2:])
    expected = model(x).shape
    assert tokenprune.patch(model, method, keep=0.5)(x).shape == expected


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


def test_a_report_of_several_patched_models_is_asked_for_one_by_one(works: nn.Module) -> None:
    other = timm.create_model("test_vit").eval()
    both = nn.ModuleDict({"first": works, "second": other})
    tokenprune.patch(works, "tome", keep=0.5)
    tokenprune.patch(other, "top_k", keep=0.5)
    with pytest.raises(UnsupportedModel, match="2 patched models"):
        tokenprune.report(both)
    assert tokenprune.report(both["second"]).to_dict()["method"] == "top_k"
    tokenprune.unpatch(both)
    with pytest.raises(UnsupportedModel, match="nothing here is patched"):
        tokenprune.report(both)


def test_a_block_that_stands_at_two_places_is_refused(works: nn.Module) -> None:
    blocks = list(works.blocks)
    works.blocks = nn.Sequential(*blocks[:3], *blocks[:3])
    with pytest.raises(UnsupportedModel, match="one and the same module"):
        tokenprune.patch(works, "top_k", keep=0.5)
    works.blocks = nn.Sequential(*blocks)


@pytest.mark.parametrize("name", ["vit", "swin", "lvlm"])
@pytest.mark.parametrize("method", ["random", "uniform"])
def test_what_a_token_is_behind_a_denoisers_stack_is_refused_elsewhere(name: str, method: str) -> None:
    kinds = {
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
        "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
        "lvlm": lambda: lvlm_zoo.build("llava"),
    }
    model = kinds[name]()
    with pytest.raises(UnsupportedMethod, match="behind a denoiser's stack"):
        tokenprune.patch(model.eval(), method, keep=0.5, recover="gain")
    with pytest.raises(UnsupportedMethod, match="'similar', 'gain' or 'residual'"):
        tokenprune.patch(model, method, keep=0.5, recover="least")
