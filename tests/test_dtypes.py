"""Promise 5: half precisions, autocast, double, quantised layers and norms without parameters."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
from families import FAMILIES, FEW, METHODS, build, images, options, run
from torch import nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.registry import make_method

HALVES = (torch.bfloat16, torch.float16)
# Every family once, the methods in turn.
PAIRS = [(family, METHODS[i % len(METHODS)]) for i, family in enumerate(FAMILIES)]


def patched(family: str, method: str = "tome") -> nn.Module:
    return tokenprune.patch(build(family), method, keep=0.5, **options(family, method))


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_cast_before_or_behind_the_patch(family: str, method: str) -> None:
    """In double as in float; in half precision finite, and of the dtype of the unpatched output."""
    model, cast = patched(family, method), build(family).double()
    x = images(model)
    expected = run(model, x)
    torch.testing.assert_close(run(model.double(), x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    for dtype in HALVES:
        cast = tokenprune.unpatch(cast).to(dtype)
        plain = run(cast, x.to(dtype))
        tokenprune.patch(cast, method, keep=0.5, **options(family, method))
        for one in (cast, model.to(dtype)):
            output = run(one, x.to(dtype))
            assert output.dtype == plain.dtype == dtype
            assert output.isfinite().all()
            assert one.forward_features(x.to(dtype)).dtype == dtype
        distance = (output.float() - expected).norm() / expected.norm()
        assert distance < (plain.float() - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", [*FEW, "talking_heads", "differential_parallel"])
@pytest.mark.parametrize("method", ["tome", "zero_tprune"])
def test_autocast(family: str, method: str, dtype: torch.dtype) -> None:
    model = build(family)
    x = images(model)
    with torch.autocast("cpu", dtype=dtype):
        plain = run(model, x)
        tokenprune.patch(model, method, keep=0.5, **options(family, method))
        output, features = run(model, x), model.forward_features(x)
        model(x).float().square().mean().backward()
    assert output.dtype == plain.dtype
    assert output.isfinite().all()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    full = run(model, x)
    assert (output.float() - full).norm() < 0.3 * full.norm()


def record(dtype: torch.dtype, scale: float, **extra: Any) -> AttentionRecord:
    """One block of an 8 x 8 grid and a class token, queries and keys `scale` times a normal sample."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (scale * torch.randn(2, 4, 65, 16, generator=generator) for _ in range(2))
    return AttentionRecord(
        hidden=torch.randn(2, 65, 64, generator=generator).to(dtype),
        origin=torch.arange(64).expand(2, -1),
        num_prefix_tokens=1,
        place=1,
        depth=4,
        grid=(8, 8),
        scale=16**-0.5,
        queries=queries.to(dtype),
        keys=extra["keys"].to(dtype) if "keys" in extra else keys.to(dtype),
    )


@pytest.mark.parametrize("method", ["top_k", "evit", "zero_tprune"])
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_of_keys_that_overflow_half_precision(method: str, dtype: torch.dtype) -> None:
    """q.k passes the largest float16, 65504, before and even behind the scale; attention is then nearly one-hot."""
    recipe = make_method(method, {})
    for scale in (1.0, 100.0, 300.0):
        reduction = recipe.reduce(record(dtype, scale), 32)
        exact = recipe.reduce(record(torch.float64, scale), 32)
        same = (reduction.source(64) >= 0) == (exact.source(64) >= 0)
        assert same.float().mean() > 0.8, scale
        if reduction.weights is not None:
            assert reduction.weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_merging_with_keys_of_no_length_or_a_great_one(dtype: torch.dtype) -> None:
    """A key of zeros is similar to none, and is not what is merged first; a long one has the cosine that it has."""
    keys = torch.randn(2, 4, 65, 16, generator=torch.Generator().manual_seed(1))
    keys[:, :, 1::2] = 0.0  # the tokens that look for a partner, but for one
    keys[:, :, 11] = 20000.0 * keys[:, :, 12].sign()
    keys[:, :, 12] = keys[:, :, 11]
    reduction = make_method("tome", {}).reduce(record(dtype, 1.0, keys=keys), 63)
    moved, target = reduction.moved, reduction.target
    assert moved is not None
    assert target is not None
    pairs = reduction.kept.gather(1, target)
    assert {moved[0].item(), pairs[0].item()} == {10, 11}


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("family", ["class_token", "rotary_registers", "map_pool", "talking_heads"])
@pytest.mark.parametrize("method", ["tome", "top_k"])
def test_quantised_layers(family: str, method: str) -> None:
    """Quantised before or behind the patch it is the same model, near to the one in float, at the same cost (with the
    whole last block: a quantised projection cannot take the prefix tokens alone)."""
    settings = {"keep": 0.5, "prefix_only_last": False, **options(family, method)}
    model = tokenprune.patch(build(family), method, **settings)
    x = images(model)
    expected = run(model, x)
    before = quantised(build(family))
    plain = run(before, x)
    tokenprune.patch(before, method, **settings)
    output = run(before, x)
    assert (output - expected).norm() < 0.3 * expected.norm()
    told = [tokenprune.report(one).to_dict()["flops_ratio"] for one in (before, model)]
    assert told[0] == told[1]
    assert torch.equal(run(quantised(model), x), output)
    assert torch.equal(run(tokenprune.unpatch(before), x), plain)


class Bare(nn.LayerNorm):
    """A norm without parameters."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, elementwise_affine=False, **kwargs)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_relpos_small_patch16_224"])
def test_norms_without_parameters(name: str) -> None:
    shape = {"depth": 3, "embed_dim": 64, "num_heads": 4, "img_size": (20, 28), "patch_size": 4}
    model = timm.create_model(name, norm_layer=Bare, num_classes=5, **shape).eval()
    assert not list(model.blocks[0].norm1.parameters())
    zoo.randomise(model, 0)
    x = torch.randn(2, 3, 20, 28)
    plain = run(model, x)
    tokenprune.patch(model, "top_k", schedule=dict.fromkeys(range(3), 1.0))
    assert torch.equal(run(model, x), plain)
    tokenprune.patch(model, "tome", flops=0.7)
    assert not tokenprune.report(model).to_dict()["skipped"]
    assert not torch.equal(run(model, x), plain)
    assert torch.equal(run(tokenprune.unpatch(model), x), plain)


@pytest.mark.parametrize("dtype", HALVES)
def test_sizes_are_counted_exactly_in_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 counts to 256 only; a class of a thousand patches has its log in the attention."""
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=64, num_heads=4, img_size=132, patch_size=4)
    zoo.randomise(model.eval(), 0)
    tokenprune.patch(model.to(dtype), "tome", tokens=140)
    with tokenprune.record(model) as recording:
        run(model, torch.randn(1, 3, 132, 132, dtype=dtype))
    for place in recording.forwards[0].places:
        assert place.sizes is not None
        assert place.sizes.sum().item() == 33 * 33
        assert torch.equal(place.sizes[0].long(), torch.bincount(place.source[0]))
