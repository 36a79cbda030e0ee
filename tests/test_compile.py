"""torch.compile, torch.export and the meta device."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokenprune

METHODS = ["random", "uniform", "top_k", "evit", "tome", "zero_tprune"]
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},
    "eva02_tiny_patch14_224": {"patch_size": 16},
    "vit_base_patch16_siglip_224": {},
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def tiny(name: str, **extra: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "img_size": 80,
        "embed_dim": 48,
        "num_heads": 3,
        "depth": 4,
        "num_classes": 7,
        **FAMILIES[name],
        **extra,
    }
    model = timm.create_model(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_one_graph_gives_the_eager_output(name: str, method: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 80, 80)
    tokenprune.patch(model, method, flops=0.7)
    with torch.no_grad():
        expected = model(images)
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_more_graphs_over_batches(method: str) -> None:
    def graphs(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for batch in (2, 3, 5, 4, 2):
                compiled(torch.randn(batch, 3, 80, 80))
        return counter.frame_count

    model = tiny("vit_tiny_patch16_224")
    plain = graphs(model)
    tokenprune.patch(model, method, flops=0.7)
    assert graphs(model) <= plain


@pytest.mark.parametrize("in_place", [False, True])
def test_either_order_of_compiling_and_patching(in_place: bool) -> None:
    model, images = tiny("vit_tiny_patch16_224"), torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        plain = model(images)
        if in_place:
            model.compile(backend="aot_eager")
            compiled = model
        else:
            compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(images), plain)
        tokenprune.patch(compiled, "top_k", flops=0.7)
        patched = compiled(images)
        assert (patched - plain).abs().max() > 1e-4
        assert len(tokenprune.report(model).to_dict()["places"]) > 0
        tokenprune.unpatch(compiled)
        torch.testing.assert_close(compiled(images), plain)


@pytest.mark.parametrize("method", METHODS)
def test_export(method: str) -> None:
    model, images = tiny("vit_tiny_patch16_224"), torch.randn(2, 3, 80, 80)
    tokenprune.patch(model, method, flops=0.7)
    with torch.no_grad():
        expected = model(images)
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_meta_device_needs_no_values(method: str) -> None:
    with torch.device("meta"):
        model = tiny("vit_tiny_patch16_224")
    tokenprune.patch(model, method, flops=0.7)
    assert model(torch.empty(2, 3, 80, 80, device="meta")).shape == (2, 7)


@pytest.mark.full
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_inductor(name: str) -> None:
    model, images = tiny(name), torch.randn(2, 3, 80, 80)
    tokenprune.patch(model, "tome", flops=0.7)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, rtol=1e-3, atol=1e-3)
