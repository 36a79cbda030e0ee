"""Images of other sizes than the usual one, and NaFlexViT's patches: right, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import zoo
from families import FAMILIES, build, images, run
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn

import tokenprune
from tokenprune import UnsupportedModel, registry
from tokenprune.attention_record import AttentionRecord
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.selection.top_k import keep_top_k


def dynamic(name: str, **kwargs: Any) -> nn.Module:
    """The model for images of any size, by default 5 x 7 patches of 4 pixels."""
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, **kwargs}
    model = timm.create_model(name, dynamic_img_size=True, num_classes=5, **shape).eval()
    zoo.randomise(model, 0)
    return model


def multiply_adds(model: nn.Module, x: Tensor) -> float:
    """Of one of the images."""
    return zoo.count(model, x[:1]).get_total_flops() / 2


DYNAMIC = [  # class token, rotary tables with and without registers and one a block, registers, no prefix, distilled
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "deit_tiny_distilled_patch16_224",
]


@pytest.mark.parametrize("method", ["top_k", "tome"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_image_size(name: str, method: str) -> None:
    model = dynamic(name)
    sizes = [(20, 28), (36, 12), (28, 44), (4, 60), (20, 28)]
    inputs = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    plain = [run(model, x) for x in inputs]
    costs = [multiply_adds(model, x) for x in inputs]
    tokenprune.patch(model, method, flops=0.6)
    for x, (height, width), reference, cost in zip(inputs, sizes, plain, costs, strict=True):
        grid = height // 4, width // 4
        y = run(model, x)
        assert y.shape == reference.shape
        assert not torch.equal(y, reference)
        features = model.forward_features(x)
        assert features.shape[1] - model.num_prefix_tokens == grid[0] * grid[1]
        assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[-2:] == grid
        reduced = multiply_adds(model, x)
        report = tokenprune.report(model).to_dict()
        assert report["tokens"] == grid[0] * grid[1]
        assert report["flops_before"] == pytest.approx(cost, rel=0.01)
        assert report["flops_after"] == pytest.approx(reduced, rel=0.02)
        assert reduced / cost == pytest.approx(0.6, abs=0.03)  # one token of few
        with tokenprune.record(model) as recording:
            run(model, x)
            model(x=x)
            model.forward_features(x)
            model.forward_intermediates(x, intermediates_only=True)
        assert [forward.grid for forward in recording.forwards] == [grid] * 4
    tokenprune.patch(model, method, schedule=dict.fromkeys(range(4), 1.0))
    for x, reference in zip(inputs, plain, strict=True):
        torch.testing.assert_close(run(model, x), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_images_that_the_host_pads_to_whole_patches(name: str) -> None:
    model = dynamic(name, dynamic_img_pad=True, img_size=(19, 27))
    sizes = {(19, 27): (5, 7), (33, 10): (9, 3), (1, 44): (1, 11)}
    inputs = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    plain = [run(model, x) for x in inputs]
    cost = multiply_adds(model, inputs[0])
    tokenprune.patch(model, "top_k", flops=0.6)
    assert multiply_adds(model, inputs[0]) / cost == pytest.approx(0.6, abs=0.03)
    assert tokenprune.report(model).to_dict()["flops_before"] == pytest.approx(cost, rel=0.01)
    for x, grid, reference in zip(inputs, sizes.values(), plain, strict=True):
        with tokenprune.record(model) as recording:
            assert not torch.equal(run(model, x), reference)
        assert recording.forwards[0].grid == grid
        assert model.forward_intermediates(x, intermediates_only=True)[-1].shape[-2:] == grid
    tokenprune.patch(model, "top_k", schedule=dict.fromkeys(range(4), 1.0))
    assert all(torch.equal(run(model, x), reference) for x, reference in zip(inputs, plain, strict=True))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("talking_heads", "naflex")])
def test_input_size_set_after_the_patch(family: str) -> None:
    """The host computes its position tables anew, some of which are indexed by token."""
    model, twin = build(family), build(family)
    x = torch.randn(2, 3, 36, 20)
    tokenprune.patch(model, "top_k", schedule={1: 0.6, 2: 0.6})
    model.set_input_size((36, 20))
    twin.set_input_size((36, 20))
    plain, features = run(twin, x), twin.forward_features(x)
    tokenprune.patch(twin, "top_k", schedule={1: 0.6, 2: 0.6})
    assert torch.equal(run(model, x), run(twin, x))
    assert not torch.equal(run(model, x), plain)
    assert model.forward_features(x).shape == features.shape
    assert tokenprune.report(model).to_dict()["tokens"] == 45
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)


@pytest.fixture
def grids() -> Iterator[list[tuple[int, int] | None]]:
    """Registers "left_columns", which keeps the left columns of the image, and lists the grids that it sees."""
    seen: list[tuple[int, int] | None] = []

    def score(record: AttentionRecord) -> Tensor:
        if not torch.compiler.is_compiling():
            seen.append(record.grid)
        return -(record.origin % (record.grid or (1, 1))[1]).float()

    def left_columns() -> Method:
        """Keep the left columns."""
        return Method(name="left_columns", paper="none", schedule=Stages(0.7), score=score, select=keep_top_k)

    register_method("left_columns")(left_columns)
    yield seen
    registry._METHODS.pop("left_columns")


def test_a_method_sees_the_grid_of_the_image(grids: list[tuple[int, int] | None]) -> None:
    model = dynamic("vit_tiny_patch16_224", patch_drop_rate=0.4)
    tokenprune.patch(model, "left_columns", schedule={0: 0.7, 2: 0.7})
    grids.clear()
    model(torch.randn(1, 3, 36, 12))
    model.forward_features(torch.randn(1, 3, 12, 20)).sum().backward()
    assert grids == [(9, 3), (9, 3), (3, 5), (3, 5)]
    grids.clear()
    model.train()(torch.randn(1, 3, 36, 12))  # some of the patches are dropped by the host
    assert grids == [None, None]


@pytest.mark.usefixtures("grids")
def test_a_compiled_method_sees_the_grid_of_the_image() -> None:
    """Images of equally many patches, in grids that lie across each other."""
    model = dynamic("vit_tiny_patch16_224")
    tokenprune.patch(model, "left_columns", schedule={1: 0.5})
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((20, 28), (28, 20), (4, 140)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-4, atol=1e-4)


def test_sizes_that_naflex_takes() -> None:
    model = build("naflex")
    sizes = [(20, 28), (32, 16), (16, 48)]
    inputs = [torch.randn(2, 3, *size) for size in sizes]
    plain = [run(model, x) for x in inputs]
    costs = [multiply_adds(model, x) for x in inputs]
    tokenprune.patch(model, "tome", flops=0.6)
    for x, reference, cost in zip(inputs, plain, costs, strict=True):
        assert run(model, x).shape == reference.shape
        assert multiply_adds(model, x) / cost == pytest.approx(0.6, abs=0.03)
        assert model.forward_features(x).shape[1] == model.num_prefix_tokens + x.shape[-2] * x.shape[-1] // 16
    tokenprune.unpatch(model)
    assert all(torch.equal(run(model, x), reference) for x, reference in zip(inputs, plain, strict=True))


def test_a_head_that_reads_every_patch_counts_with_the_image() -> None:
    """Attention pooling over merged tokens reads the restored grid: at an image much smaller than the usual one it
    must not be budgeted at its usual cost."""
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "patch_size": zoo.PATCH}
    model = timm.create_model("vit_base_patch16_siglip_224", use_naflex=True, **shape).eval()
    zoo.randomise(model, 0)
    x = torch.randn(1, 3, 20, 28)
    cost = multiply_adds(model, x)
    tokenprune.patch(model, "tome", flops=0.6)
    assert multiply_adds(model, x) / cost == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("method", ["top_k", "evit", "tome", "tofu", "diffrate"])
def test_restoring_the_grid_in_a_forward_counts(method: str) -> None:
    """A forward without pooling ends on the full grid: regressing its patches is in the budget, at many of them too."""
    model = dynamic("vit_tiny_patch16_224", global_pool="")
    # What diffrate compares with what depends on how many stay, which a cost model of another size does not know.
    for size, tolerance in (((20, 28), 1e-6), ((128, 128), 1e-2 if method == "diffrate" else 2e-3)):
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        tokenprune.unpatch(model)
        cost = multiply_adds(model, x)
        tokenprune.patch(model, method, flops=0.6)
        reduced = multiply_adds(model, x)
        assert tokenprune.report(model).to_dict()["flops_after"] == pytest.approx(reduced, rel=tolerance)
        assert reduced / cost == pytest.approx(0.6, abs=0.01)


def naflex_patches(model: nn.Module, x: Tensor, padding: int) -> dict[str, Tensor]:
    """The images as NaFlexViT's collator gives them: patches, their rows and columns, and which are not padding."""
    patches, (rows, columns) = batch_patchify(x, (zoo.PATCH, zoo.PATCH), pad=False)
    coordinates = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(len(x), -1, -1)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    parts = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    return {
        name: torch.cat([part, part.new_zeros(len(x), padding, *part.shape[2:])], 1) for name, part in parts.items()
    }


@pytest.mark.parametrize("padding", [0, 5])
def test_naflex_patches_under_a_mask_are_refused(padding: int) -> None:
    model = build("naflex")
    x = images(model)
    batch = naflex_patches(model, x, padding)
    plain, features = model(batch), model.forward_features(**batch)["patches"]
    tokenprune.patch(model, "top_k", keep=1.0)
    assert torch.equal(model(batch), plain)
    assert torch.equal(model.forward_features(**batch)["patches"], features)
    tokenprune.patch(model, "top_k", keep=0.5)
    calls: list[Callable[[], Any]] = [
        lambda: model(batch),
        lambda: model(x=batch),
        lambda: model(**{"x" if name == "patches" else name: part for name, part in batch.items()}),
        lambda: model.forward_features(**batch),
        lambda: model.forward_intermediates(batch, output_fmt="NLC", output_dict=True),
    ]
    reduced = model(x)
    for call in calls:
        with tokenprune.record(model), pytest.raises(UnsupportedModel, match="padded patches"):
            call()
        assert torch.equal(model(x), reduced)
    tokenprune.unpatch(model)
    assert torch.equal(model(batch), plain)


@pytest.mark.parametrize("rope", ["", "axial", "mixed"])
@pytest.mark.parametrize("method", ["top_k", "tome"])
def test_naflex_patches_without_a_mask(method: str, rope: str) -> None:
    """The same tokens as of the image that they were cut from; but they may lie anywhere, so there is no grid, and
    what is dropped is restored by its content alone."""
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "patch_size": zoo.PATCH, "pos_embed_grid_size": (4, 6)}
    model = timm.create_model("naflexvit_base_patch16_gap", rope_type=rope, **shape).eval()
    zoo.randomise(model, 0)
    x = torch.randn(2, 3, 20, 28)
    batch = naflex_patches(model, x, 0)
    del batch["patch_valid"]
    plain = model.forward_features(**batch)["patches"]
    tokenprune.patch(model, method, schedule=dict.fromkeys(range(4), 1.0))
    torch.testing.assert_close(model.forward_features(**batch)["patches"], plain, rtol=1e-4, atol=1e-4)
    tokenprune.patch(model, method, keep=0.5)
    with tokenprune.record(model) as recording:
        features = model.forward_features(**batch)["patches"]
        image_features = model.forward_features(x)
    assert [forward.grid for forward in recording.forwards] == [None, (5, 7)]
    assert not torch.equal(features, plain)
    sources = [[place.source for place in forward.places] for forward in recording.forwards]
    for a, b in zip(*sources, strict=True):
        assert torch.equal(a, b)
    kept = sources[0][-1] >= 0
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(features[:, prefix:][kept], image_features[:, prefix:][kept], rtol=1e-4, atol=1e-4)
    _, own = model.forward_intermediates(batch, output_fmt="NLC")
    _, reference = model.forward_intermediates(x, output_fmt="NLC")
    for a, b in zip(own, reference, strict=True):
        torch.testing.assert_close(a[kept], b[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_patch_dropout_of_the_host_in_training(name: str) -> None:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4}
    model = timm.create_model(name, patch_drop_rate=0.3, num_classes=5, **shape).train()
    zoo.randomise(model, 0)
    x = torch.randn(2, 3, 20, 28)

    def output() -> Tensor:
        torch.manual_seed(0)
        y: Tensor = model(x)
        return y

    plain = output()
    tokenprune.patch(model, "top_k", schedule=dict.fromkeys(range(4), 1.0))
    assert torch.equal(output(), plain)
    tokenprune.patch(model, "top_k", keep=0.5)
    output().sum().backward()
    assert tokenprune.report(model).to_dict()["places"][0]["tokens_in"] == 24
