"""Promise 1: `unpatch` brings back the same bits and leaves nothing; `patched`, repeated and inner patches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, FEW, METHODS, build, images, options, run, states_in_memory
from torch import nn

import tokenprune


def everything(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The class and what is in the vars() of every module, containers opened."""
    for name, module in model.named_modules():
        yield name, type(module)
        for key, value in vars(module).items():
            yield f"{name}.{key}", value
            if isinstance(value, dict):
                yield from ((f"{name}.{key}[{inner!r}]", item) for inner, item in value.items())


def assert_same(before: list[tuple[str, Any]], model: nn.Module) -> None:
    after = list(everything(model))
    assert [name for name, _ in before] == [name for name, _ in after]
    assert not [name for (name, old), (_, new) in zip(before, after, strict=True) if old is not new]


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, "tome") for family in FAMILIES] + [("class_token", method) for method in METHODS if method != "tome"],
)
def test_unpatch_leaves_nothing(family: str, method: str) -> None:
    model = build(family)
    x = images(model)
    plain, before = run(model, x), list(everything(model))
    tokenprune.patch(model, method, flops=0.7, **options(family, method))
    assert not torch.equal(run(model, x), plain)
    assert tokenprune.unpatch(model) is model
    assert_same(before, model)
    assert torch.equal(run(model, x), plain)


def test_nothing_is_left_in_memory() -> None:
    before = states_in_memory()  # what a checkpointed backward of another test was in the middle of
    model = build("class_token")
    tokenprune.patch(model, "tome", keep=0.5)
    run(model, images(model))
    model.forward_features(images(model)).sum().backward()
    model.forward_intermediates(images(model))
    assert states_in_memory() <= before


def test_unpatching_the_unpatched_does_nothing() -> None:
    model = build("class_token")
    before = list(everything(model))
    tokenprune.unpatch(model)
    assert_same(before, model)


def test_the_later_patch_replaces() -> None:
    model = build("class_token")
    x = images(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    once = run(model, x)
    tokenprune.patch(model, "tome", flops=0.6)
    assert tokenprune.report(model).to_dict()["method"] == "tome"
    tokenprune.patch(model, "top_k", keep=0.5)
    assert torch.equal(run(model, x), once)


def test_a_patch_that_fails_leaves_the_earlier_one() -> None:
    model = build("class_token")
    x = images(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    once, before = run(model, x), tokenprune.report(model).to_dict()
    for wrong in ({"flops": 0.01}, {"schedule": {99: 0.5}}, {"tokens": 10_000}, {"keep": 0.5, "flops": 0.5}):
        with pytest.raises(tokenprune.BudgetError):
            tokenprune.patch(model, "tome", **wrong)
        assert torch.equal(run(model, x), once)
        assert tokenprune.report(model).to_dict() == before


def test_patched_puts_back_what_was_there() -> None:
    model = build("class_token")
    x = images(model)
    plain, before = run(model, x), list(everything(model))
    with tokenprune.patched(model, "top_k", keep=0.5) as inner:
        assert inner is model
        outer = run(model, x)
        with tokenprune.patched(model, "tome", flops=0.6):
            assert not torch.equal(run(model, x), outer)
        assert torch.equal(run(model, x), outer)
        with pytest.raises(RuntimeError, match="mine"), tokenprune.patched(model, "uniform", keep=0.5):
            raise RuntimeError("mine")
        assert torch.equal(run(model, x), outer)
        assert tokenprune.report(model).to_dict()["method"] == "top_k"
    assert torch.equal(run(model, x), plain)
    assert_same(before, model)


def test_patched_that_fails_to_start_leaves_the_earlier_patch() -> None:
    model = build("class_token")
    tokenprune.patch(model, "top_k", keep=0.5)
    once = run(model, images(model))
    with pytest.raises(tokenprune.BudgetError), tokenprune.patched(model, "tome", flops=0.01):
        pass
    assert torch.equal(run(model, images(model)), once)


@pytest.mark.parametrize("family", FEW)
def test_after_an_exception_inside_a_forward(family: str) -> None:
    model = build(family)
    x = images(model)
    plain, before = run(model, x), list(everything(model))
    tokenprune.patch(model, "tome", keep=0.5)
    reduced, features = run(model, x), model.forward_features(x)

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("mine")

    for place in (model.blocks[2], model.blocks[2].mlp, model.blocks[2].norm1):
        handle = place.register_forward_pre_hook(fail)
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(RuntimeError, match="mine"):
                call(x)
            handle.remove()
            assert torch.equal(model.forward_features(x), features)
            assert torch.equal(run(model, x), reduced)
            handle = place.register_forward_pre_hook(fail)
        handle.remove()
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 5, 4, 4))  # fails before the first block
    assert torch.equal(model.forward_features(x), features)
    other = build("class_token")
    other_plain = run(other, images(other))
    handle = model.blocks[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        model(x)
    assert torch.equal(run(other, images(other)), other_plain)
    tokenprune.patch(other, "top_k", schedule=dict.fromkeys(range(4), 1.0))
    assert torch.equal(run(other, images(other)), other_plain)
    handle.remove()
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    assert_same(before, model)


def test_a_block_called_by_itself_after_an_exception() -> None:
    model = build("class_token")
    tokens = torch.randn(2, 36, 96)
    with torch.no_grad():
        alone = model.blocks[3](tokens)
    tokenprune.patch(model, "top_k", schedule={1: 0.5})
    handle = model.blocks[3].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images(model))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.blocks[3](tokens), alone)
        assert torch.equal(model.blocks[3].forward(tokens), alone)


def test_patch_inside_a_larger_module() -> None:
    vit = build("class_token")
    outer = nn.ModuleDict({"tower": vit, "head": nn.Linear(4, 4)})
    plain = run(vit, images(vit))
    assert tokenprune.patch(outer, "top_k", keep=0.5) is outer
    assert not torch.equal(run(vit, images(vit)), plain)
    assert tokenprune.report(outer).to_dict() == tokenprune.report(vit).to_dict()
    tokenprune.unpatch(outer)
    assert torch.equal(run(vit, images(vit)), plain)


def test_two_models_inside_one_module_are_patched_by_themselves() -> None:
    first, second = build("class_token"), build("rotary")
    both = nn.ModuleList([first, second])
    x = images(first)
    plain = [run(first, x), run(second, x)]
    with pytest.raises(tokenprune.UnsupportedModel, match="2"):
        tokenprune.patch(both, keep=0.5)
    tokenprune.patch(first, "top_k", keep=0.5)
    tokenprune.patch(second, "tome", keep=0.5)
    assert not torch.equal(run(first, x), plain[0])
    assert not torch.equal(run(second, x), plain[1])
    tokenprune.unpatch(both)
    assert torch.equal(run(first, x), plain[0])
    assert torch.equal(run(second, x), plain[1])


def test_unpatch_of_a_copy_leaves_the_original_patched() -> None:
    model = build("class_token")
    x = images(model)
    plain = run(model, x)
    tokenprune.patch(model, "tome", keep=0.5)
    reduced = run(model, x)
    twin = copy.deepcopy(model)
    tokenprune.unpatch(twin)
    assert torch.equal(run(twin, x), plain)
    assert torch.equal(run(model, x), reduced)
    tokenprune.patch(twin, "uniform", keep=0.3)
    run(twin, x)
    assert tokenprune.report(model).to_dict()["method"] == "tome"
    assert torch.equal(run(model, x), reduced)


def test_another_patched_model_run_inside_a_block_is_refused() -> None:
    student, teacher = build("class_token"), build("class_token")
    x = images(student)
    tokenprune.patch(student, "top_k", keep=0.5)
    tokenprune.patch(teacher, "tome", keep=0.5)
    handle = student.blocks[1].attn.register_forward_hook(lambda module, args, output: (teacher(x), None)[1])
    with pytest.raises(tokenprune.UnsupportedModel, match=r"blocks\.1"):
        student(x)
    handle.remove()
    reduced = run(student, x)
    student.blocks[1].register_forward_hook(lambda module, args, output: (run(teacher, x), None)[1])
    assert torch.equal(run(student, x), reduced)
