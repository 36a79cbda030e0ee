"""Dropped patches in dense outputs: a regression from the kept ones, against one that is written out in loops."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import zoo
from adaptive import registered
from families import build, images, options, patches
from torch import Tensor, nn

import tokenprune

PLACES = {1: 0.7, 3: 0.5}
GRID = (5, 7)


def metric(x: list[float], patch: int, grid: tuple[int, int]) -> list[float]:
    """The direction of x, and at half its weight that of the patch's place."""
    angles = [math.pi * (patch // grid[1]) / grid[0], math.pi * (patch % grid[1]) / grid[1]]
    place = [f(a) * 0.5 / math.sqrt(2) for f in (math.cos, math.sin) for a in angles]
    length = math.sqrt(sum(v * v for v in x))
    return [v / length for v in x] + place


def kernel(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a) * sum(v * v for v in b))
    return math.exp(1.25 * (sum(v * w for v, w in zip(a, b, strict=True)) / lengths - 1))


def regressed(
    entering: Tensor, origin: list[int], values: dict[int, Tensor], grid: tuple[int, int] = GRID
) -> dict[int, Tensor]:
    """Values of all tokens [n, C] that entered a place, by patch, from those of the tokens that left it."""
    metrics = {patch: metric(row.tolist(), patch, grid) for patch, row in zip(origin, entering, strict=True)}
    kept = list(values)
    covariance = torch.tensor(
        [[kernel(metrics[a], metrics[b]) + 0.01 * (a == b) for b in kept] for a in kept], dtype=values[kept[0]].dtype
    )
    mean = torch.stack(list(values.values())).mean(0)
    differences = torch.linalg.inv(covariance) @ torch.stack([value - mean for value in values.values()])
    full = dict(values)
    for patch in set(origin) - set(kept):
        full[patch] = mean + sum(kernel(metrics[patch], metrics[k]) * d for k, d in zip(kept, differences, strict=True))
    return full


@pytest.mark.parametrize("method", ["top_k", "evit", "zero_tprune"])
@pytest.mark.parametrize("family", ["class_token", "registers", "mean_pool"])
def test_dropped_patches_are_regressed_from_the_kept_ones(family: str, method: str) -> None:
    """Through two places. The fused token that EViT appends at one takes no part there, but is a token at the next."""
    model = build(family).double()
    x = images(model).double()
    tokenprune.patch(model, method, schedule=PLACES)
    entering: dict[int, list[Tensor]] = {index: [] for index in PLACES}
    leaving: list[Tensor] = []
    for index, parts in entering.items():
        model.blocks[index].register_forward_pre_hook(lambda module, args, parts=parts: parts.append(args[0]))
        model.blocks[index].ls1.register_forward_hook(lambda module, args, out, parts=parts: parts.append(out))
    model.blocks[3].norm2.register_forward_pre_hook(lambda module, args: leaving.append(args[0]))
    model.blocks[3].ls2.register_forward_hook(lambda module, args, out: leaving.append(out))
    with tokenprune.record(model) as recording, torch.no_grad():
        [features] = model.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)
    prefix, fused = model.num_prefix_tokens, int(method == "evit")
    for i in range(len(x)):
        tokens = sum(leaving)[i, prefix:]
        origins = [list(range(patches(model)))] + [place.kept[i].tolist() for place in recording.forwards[0].places]
        values = dict(zip(origins[2], tokens, strict=True))
        for index, entered, left in zip(reversed(PLACES), origins[1::-1], origins[:0:-1], strict=True):
            values = {patch: values[patch] for patch in left[: len(left) - fused]}
            values = regressed(sum(entering[index])[i, prefix:], entered, values)
        expected = torch.stack([values[patch] for patch in range(patches(model))])
        torch.testing.assert_close(features[i], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["top_k", "threshold"])
def test_of_many_kept_patches_every_second_takes_part(method: str) -> None:
    grid = 23, 23
    shape = {"depth": 1, "embed_dim": 8, "num_heads": 2, "img_size": 92, "patch_size": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **shape).double().eval()
    zoo.randomise(model, 0)
    x = torch.randn(1, 3, 92, 92, generator=torch.Generator().manual_seed(0)).double()
    with registered():
        share = {"threshold": {"schedule": {0: 1.0}, "times": 0.01}, "top_k": {"schedule": {0: 0.98}}}
        tokenprune.patch(model, method, **share[method])
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    block = model.blocks[0]
    block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    block.ls1.register_forward_hook(lambda module, args, out: entering.append(out))
    block.norm2.register_forward_pre_hook(lambda module, args: leaving.append(args[0]))
    block.ls2.register_forward_hook(lambda module, args, out: leaving.append(out))
    with tokenprune.record(model) as recording, torch.no_grad():
        [features] = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)
    kept = recording.forwards[0].places[0].kept[0].tolist()
    assert 512 < len(kept) < 529
    values = dict(zip(kept, sum(leaving)[0, 1:], strict=True))
    some = {patch: values[patch] for patch in kept[::2]}
    expected = regressed(sum(entering)[0, 1:], list(range(529)), some, grid) | values
    torch.testing.assert_close(
        features[0], torch.stack([expected[patch] for patch in range(529)]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_restored_patches_pass_gradients_on(method: str) -> None:
    """Weights sum to one, so that a bias behind the last place moves every patch of the full grid by as much."""
    model = build("class_token").train()
    tokenprune.patch(model, method, schedule=PLACES, **options("class_token", method))
    x = images(model)
    [features] = model.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)
    features.sum().backward()
    block = model.blocks[3]
    bias = block.mlp.fc2.bias.grad
    gamma = getattr(block.ls2, "gamma", torch.ones(1)).detach()
    expected = features.shape[0] * features.shape[1] * gamma.expand_as(bias)
    torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["top_k", "evit"])
def test_features_compile_and_export(method: str) -> None:
    model = build("class_token")
    tokenprune.patch(model, method, schedule=PLACES)
    x = images(model)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            features: Tensor = self.model.forward_features(x)
            return features

    with torch.no_grad():
        expected = model.forward_features(x)
        compiled = torch.compile(model.forward_features, backend="aot_eager", fullgraph=True)(x)
        exported = torch.export.export(Features(), (x,)).module()(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)


def test_nearly_equal_tokens_and_images_that_are_not_numbers() -> None:
    """An image of one colour, whose patches differ by their places alone, and one of NaN do not spoil each other."""
    model = build("class_token")
    tokenprune.patch(model, "top_k", schedule=PLACES)
    good = images(model, 1)
    x = torch.cat([good, torch.zeros_like(good), torch.full_like(good, torch.nan)])
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(features[:1], model.forward_features(good), rtol=1e-4, atol=1e-4)
    assert features[1].isfinite().all()
    assert features[2].isnan().all()
