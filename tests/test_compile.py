"""Promise 5: torch.compile, torch.export and the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
from families import FAMILIES, METHODS, build, full_but, images, options, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokenprune

PAIRS = [(f, m) for f in FAMILIES for m in METHODS if f == "class_token" or m in ("tome", "zero_tprune")]
FAST = (("class_token", "top_k"), ("rotary_registers", "tome"), ("bias_own_table", "zero_tprune"), ("map_pool", "tome"))
NAMES = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224")
SHAPE = {"depth": 2, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, "num_classes": 5}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def patched(family: str, method: str = "tome") -> tuple[nn.Module, Tensor]:
    model = tokenprune.patch(build(family), method, keep=0.5, **options(family, method))
    return model, images(model)


def dynamic(name: str) -> nn.Module:
    model = timm.create_model(name, dynamic_img_size=True, **SHAPE).eval()
    zoo.randomise(model, 0)
    return model


def graphs(model: nn.Module, inputs: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Number of graphs made so far behind each compiled forward, and the outputs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled, made, outputs = torch.compile(model, backend=counter, fullgraph=True), [], []
    for x in inputs:
        outputs.append(run(compiled, x))
        made.append(counter.frame_count)
    return made, outputs


def pictures(*shapes: tuple[int, int, int]) -> list[Tensor]:
    return [torch.randn(batch, 3, *size) for batch, *size in shapes]


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pair", full_but(FAST, PAIRS), ids=" ".join)
def test_one_graph_gives_the_eager_output(pair: tuple[str, str]) -> None:
    family, method = pair
    model, x = patched(family, method)
    expected = run(model, x)
    close(run(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)


@pytest.mark.parametrize("method", full_but(("tome", "zero_tprune"), METHODS))
def test_no_more_graphs_over_batches(method: str) -> None:
    model, inputs = dynamic("vit_tiny_patch16_224"), pictures(*((batch, 20, 28) for batch in (2, 2, 3, 5, 4, 2)))
    plain, _ = graphs(model, inputs)
    tokenprune.patch(model, method, flops=0.75)
    assert graphs(model, inputs)[0] == plain


@pytest.mark.parametrize("name", full_but(NAMES[:1], NAMES))
@pytest.mark.parametrize("method", full_but(("tome",), METHODS))
def test_no_more_graphs_over_sizes(name: str, method: str) -> None:
    model, inputs = dynamic(name), pictures((2, 20, 28), (2, 28, 36), (2, 20, 28), (3, 28, 36), (2, 32, 20))
    plain, _ = graphs(model, inputs)
    tokenprune.patch(model, method, flops=0.75)
    made, outputs = graphs(model, inputs)
    assert made == plain
    for x, got in zip(inputs, outputs, strict=True):
        close(got, run(model, x))


def test_the_report_of_a_compiled_forward() -> None:
    model, (first, second) = dynamic("vit_tiny_patch16_224"), pictures((2, 20, 28), (2, 28, 36))
    tokenprune.patch(model, "top_k", flops=0.75)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x in (first, second, first):
        run(model, x)
        told = tokenprune.report(model).to_dict()
        run(model, first if x is second else second)
        run(compiled, x)
        assert tokenprune.report(model).to_dict() == told


def test_models_of_one_class_do_not_share_their_counts() -> None:
    first, x = patched("class_token", "top_k")
    second = tokenprune.patch(build("class_token"), "top_k", keep=0.2)
    for _ in range(2):
        for model in (first, second):
            close(run(torch.compile(model, backend="eager", fullgraph=True), x), run(model, x))


@pytest.mark.parametrize("in_place", [False, True])
def test_either_order_of_compiling_and_patching(in_place: bool) -> None:
    model = build("class_token")
    x = images(model)
    plain = run(model, x)
    if in_place:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    close(run(compiled, x), plain)
    tokenprune.patch(compiled, "top_k", keep=0.5)
    assert (run(compiled, x) - plain).abs().max() > 1e-2
    assert len(tokenprune.report(model).to_dict()["places"]) > 0
    tokenprune.unpatch(compiled)
    close(run(compiled, x), plain)


@pytest.mark.parametrize("family", full_but(("class_token",), FAMILIES))
@pytest.mark.parametrize("wrap", [False, pytest.param(True, marks=pytest.mark.full)], ids=["in_place", "wrapped"])
def test_blocks_compiled_one_by_one_keep_their_tokens(family: str, wrap: bool) -> None:
    model, x = patched(family)
    expected, features = run(model, x), model.forward_features(x).detach()
    for i, block in enumerate(model.blocks):
        if wrap:
            model.blocks[i] = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager")
    for _ in range(2):
        close(run(model, x), expected)
    with torch.no_grad():
        close(model.forward_features(x), features)


def test_some_blocks_compiled_and_some_not() -> None:
    model, x = patched("bias_own_table")
    expected = run(model, x)
    for i in (1, 3):
        model.blocks[i].compile(backend="eager")
    close(run(model, x), expected)


@pytest.mark.parametrize("family", full_but(("map_pool",), FAMILIES))
@pytest.mark.parametrize("method", full_but(("tome",), ("tome", "top_k")))
def test_features_compiled_by_themselves_are_the_full_grid(family: str, method: str) -> None:
    model, x = patched(family, method)

    def inner(x: Tensor) -> list[Tensor]:
        return list(model.forward_intermediates(x, indices=[1, 3], intermediates_only=True))

    with torch.no_grad():
        for call in (model.forward_features, inner):
            close(torch.compile(call, backend="eager", fullgraph=True)(x), call(x))
        close(run(torch.compile(model, backend="eager", fullgraph=True), x), run(model, x))


@pytest.mark.parametrize("family", full_but(("class_token",), FAMILIES))
def test_a_compiled_training_step(family: str) -> None:
    model, x = patched(family)
    model.train()

    def step(call: Any) -> list[Tensor]:
        torch.manual_seed(0)  # some hosts drop out in their position bias
        model.zero_grad()
        call(x).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = step(model)
    got = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(other.abs().max())))


def test_recording_of_compiled_models() -> None:
    """Compiled code runs eagerly while it is recorded, and goes on compiled behind it, in the same graph."""
    model, x = patched("class_token", "top_k")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with tokenprune.record(model) as eager:
        run(model, x)
    run(compiled, x)
    with tokenprune.record(compiled) as recording:
        for _ in range(3):
            run(compiled, x)
    run(compiled, x)
    assert counter.frame_count == 1
    assert len(recording.forwards) == 3
    for forward in recording.forwards:
        for place, expected in zip(forward.places, eager.forwards[0].places, strict=True):
            assert torch.equal(place.source, expected.source)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_size_whose_budget_cannot_be_met(fullgraph: bool) -> None:
    model = tokenprune.patch(dynamic("vit_tiny_patch16_224"), "top_k", tokens=20)
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    x, small = torch.randn(2, 3, 20, 28), torch.randn(2, 3, 12, 12)
    expected = run(compiled, x)
    with pytest.raises(Exception, match="BudgetError: tokens=20 asked, but only 9"):
        run(compiled, small)
    with pytest.raises(tokenprune.BudgetError, match="only 9"):
        run(model, small)
    assert torch.equal(run(compiled, x), expected)


@pytest.mark.parametrize("method", full_but(("tome", "zero_tprune"), METHODS))
def test_export_with_a_dynamic_batch(method: str) -> None:
    model = tokenprune.patch(dynamic("vit_tiny_patch16_224"), method, keep=0.5)
    x = images(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
        for count in (2, 5):
            close(exported(images(model, count)), model(images(model, count)))


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_every_family(family: str, strict: bool) -> None:
    plain = build(family)
    model, x = patched(family)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        torch.export.export(plain, (x,), dynamic_shapes=({0: batch},), strict=strict)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict).module()
        close(exported(images(model, 5)), model(images(model, 5)))


@pytest.mark.parametrize("method", METHODS)
def test_the_meta_device_needs_no_values(method: str) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **SHAPE).eval()
    tokenprune.patch(model, method, flops=0.76)
    assert model(torch.empty(2, 3, 20, 28, device="meta")).shape == (2, 5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["class_token", "rotary", "map_pool"])
def test_inductor(family: str) -> None:
    model, x = patched(family)
    expected = run(model, x)
    close(run(torch.compile(model, fullgraph=True), x), expected)
