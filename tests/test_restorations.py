"""What stands for a token that left, as the user has chosen it: against references that are written out in loops."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
from adaptive import registered
from families import FAMILIES, FEW, build, full_but, images, options, patches, run
from test_restore import GRID, metric, regressed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenprune
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel

PLACES = {0: 0.8, 2: 0.6}
LAST = 3
CHOICES = ("regression", "feature", "place", "fusion")
Values = dict[int, Tensor]


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Of one image, by torch's counter."""
    return int(zoo.count(model, x[:1]).get_total_flops()) // 2


def of_alike(entered: Tensor, origin: list[int], values: Values) -> Values:
    """Each token that left takes the value of the kept one with the largest cosine."""
    metrics = {patch: metric(row.tolist(), patch, GRID) for patch, row in zip(origin, entered, strict=True)}
    full = {}
    for patch in origin:
        lengths = {k: sum(v * v for v in metrics[k]) ** 0.5 for k in values}
        cosines = {k: sum(v * w for v, w in zip(metrics[patch], metrics[k], strict=True)) / lengths[k] for k in values}
        full[patch] = values[patch if patch in values else max(cosines, key=cosines.__getitem__)]
    return full


def of_near(origin: list[int], values: Values) -> Values:
    """Each takes that of the nearest kept patch in the image, of equals the one that left first."""
    full = {}
    for patch in origin:
        row, column = divmod(patch, GRID[1])
        squares = {k: (k // GRID[1] - row) ** 2 + (k % GRID[1] - column) ** 2 for k in values}
        full[patch] = values[min(squares, key=squares.__getitem__)]
    return full


def of_itself(entered: Tensor, origin: list[int], left: Values, values: Values, groups: dict[int, int]) -> Values:
    """Each comes back as it was, a merged one with what its group (named by its kept token) has gained since."""
    full = dict(values)
    for patch, own in zip(origin, entered, strict=True):
        if patch in groups:
            full[patch] = own + values[groups[patch]] - left[groups[patch]]
        elif patch not in values:
            full[patch] = own
    return full


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("method", ["top_k", "evit", "tome", "threshold", "merge_threshold"])
def test_restored_tokens(method: str, choice: str) -> None:
    """Through two places. What last-layer fusion brings back is what the last block sees and runs on as ever."""
    model = build("class_token").double()
    last = zoo.create("vit_tiny_patch16_224").double().blocks[LAST]
    x = images(model, 1).double()
    with registered():
        shares = dict.fromkeys(PLACES, 1.0) if method == "merge_threshold" else PLACES
        tokenprune.patch(model, method, schedule=shares, restore=choice)
    entered: dict[int, list[Tensor]] = {index: [] for index in PLACES}
    left: dict[int, list[Tensor]] = {index: [] for index in PLACES}
    seen: list[Tensor] = []
    for index in PLACES:
        block = model.blocks[index]
        block.register_forward_pre_hook(lambda module, args, index=index: entered[index].append(args[0]))
        block.ls1.register_forward_hook(lambda module, args, out, index=index: entered[index].append(out))
        block.norm2.register_forward_pre_hook(lambda module, args, index=index: left[index].append(args[0]))
    model.blocks[LAST].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.blocks[2 if choice == "fusion" else LAST].ls2.register_forward_hook(lambda m, args, out: seen.append(out))
    model.blocks[2 if choice == "fusion" else LAST].norm2.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with tokenprune.record(model) as recording, torch.no_grad():
        [features] = model.forward_intermediates(x, indices=[LAST], output_fmt="NLC", intermediates_only=True)
    places = recording.forwards[0].places
    origins = [list(range(patches(model))), *(place.kept[0].tolist() for place in places)]
    fused = int(method == "evit")
    behind = seen[0] + seen[1] if choice == "fusion" else seen[1] + seen[2]
    values = dict(zip(origins[2][: len(origins[2]) - fused], behind[0, 1:], strict=False))
    sources = [[-1] * len(origins[0]), *(place.source[0].tolist() for place in places)]
    for number, index in ((2, 2), (1, 0)):
        origin, tokens = origins[number - 1], sum(entered[index])[0, 1:]
        kept = origins[number][: len(origins[number]) - fused]
        values = {patch: values[patch] for patch in kept}
        if choice == "regression":
            values = regressed(tokens, origin, values)
        elif choice == "feature":
            values = of_alike(tokens, origin, values)
        elif choice == "place":
            values = of_near(origin, values)
        else:
            merged = {p: kept[sources[number][p]] for p in origin if "tome" in method or "merge" in method}
            own = dict(zip(origins[number], left[index][0][0, 1:], strict=True))
            values = of_itself(tokens, origin, own, values, merged)
    expected = torch.stack([values[patch] for patch in range(patches(model))])
    if choice == "fusion":
        whole = next(part for part in seen if part.shape[1] == patches(model) + 1)
        torch.testing.assert_close(whole[0, 1:], expected, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            expected = last(whole)[0, 1:]
    torch.testing.assert_close(features[0], expected, rtol=1e-6, atol=1e-6)


DENSE = [("top_k", choice) for choice in CHOICES] + [("tome", choice) for choice in ("unmerge", *CHOICES)]


@pytest.mark.parametrize(("method", "choice"), [*DENSE, *(("threshold", choice) for choice in CHOICES)])
def test_dense_outputs_are_full_and_agree(method: str, choice: str) -> None:
    """By all entry points the same, kept tokens in their own places, also behind a block before the last."""
    model = build("class_token")
    getter = timm.models._features.FeatureGetterNet(model, out_indices=[1, LAST], output_fmt="NLC", norm=False)
    x = images(model)
    seen: dict[int, Tensor] = {}
    with registered(), torch.no_grad():
        tokenprune.patch(model, method, schedule=PLACES, restore=choice)
        for index in (2, LAST):
            model.blocks[index].register_forward_pre_hook(lambda m, args, index=index: seen.update({index: args[0]}))
        whole, inter = model.forward_intermediates(x, indices=[1, LAST], output_fmt="NLC")
        features = model.forward_features(x)
        maps = getter(x)
    assert features.shape == (2, 1 + patches(model), model.embed_dim)
    assert seen[LAST].shape[1] < features.shape[1] or choice == "fusion"
    torch.testing.assert_close(whole, features)
    torch.testing.assert_close(model.norm(inter[1]), features[:, 1:], rtol=1e-4, atol=1e-4)
    for one, other in zip(inter, maps, strict=True):
        torch.testing.assert_close(one, other)
    if method != "threshold" and (method, choice) != ("tome", "fusion"):
        with tokenprune.record(model) as recording, torch.no_grad():
            model.forward_features(x)
        kept = recording.forwards[0].places[0].kept
        for image in range(2):
            torch.testing.assert_close(inter[0][image, kept[image]], seen[2][image, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "choice"), DENSE)
def test_a_budget_counts_what_restoring_costs(method: str, choice: str) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=48, num_heads=3, img_size=(44, 36), patch_size=4, global_pool=""
    ).eval()
    zoo.randomise(model, 0)
    x = torch.randn(1, 3, 44, 36)
    cost = multiply_adds(model, x)
    tokenprune.patch(model, method, flops=0.8, restore=choice)
    reduced = multiply_adds(model, x)
    assert tokenprune.report(model).to_dict()["flops_after"] == pytest.approx(reduced, rel=1e-6)
    assert reduced / cost == pytest.approx(0.8, abs=0.01)


def test_fusion_costs_a_whole_last_block_in_every_forward() -> None:
    """Also where only the class token is read behind it, and the solver leaves fewer tokens elsewhere for it."""
    model = build("class_token")
    x = images(model, 1)
    cost = multiply_adds(model, x)
    last: list[int] = []
    model.blocks[LAST].mlp.register_forward_pre_hook(lambda module, args: last.append(args[0].shape[1]))
    for method in ("top_k", "tome"):
        tokenprune.patch(model, method, flops=0.75, restore="fusion")
        report = tokenprune.report(model).to_dict()
        assert multiply_adds(model, x) / cost == pytest.approx(0.75, abs=0.02)
        assert report["flops_after"] == pytest.approx(multiply_adds(model, x), rel=1e-6)
        assert last[-1] == 1 + patches(model)
        assert report["places"][-1]["name"] != "blocks.3"
        assert "fusion" in report["skipped"]["blocks.3"]


@pytest.mark.parametrize("family", full_but(FEW, FAMILIES))
def test_fusion_that_keeps_everything_changes_nothing(family: str) -> None:
    """Rotary tables, biases and sizes of all tokens are back with them."""
    model = build(family)
    x = images(model)
    plain, features = run(model, x), model.forward_features(x)
    for method in ("top_k", "tome"):
        own = options(family, method)
        tokenprune.patch(model, method, schedule=dict.fromkeys(range(LAST), 1.0), restore="fusion", **own)
        torch.testing.assert_close(run(model, x), plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.forward_features(x), features, rtol=1e-4, atol=1e-4)
        tokenprune.patch(model, method, schedule={0: 0.8, 2: 0.6}, restore="fusion", **own)
        assert run(model, x).shape == plain.shape
        assert model.forward_features(x).shape == features.shape
        tokenprune.patch(model, method, keep=1.0, restore="fusion", **own)
        assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        ("top_k", "fusion"),
        *(
            pytest.param(method, choice, marks=pytest.mark.full)
            for method, choice in (("top_k", "feature"), ("top_k", "place"), ("tome", "fusion"))
        ),
    ],
)
def test_compiled(method: str, choice: str) -> None:
    model = build("class_token")
    tokenprune.patch(model, method, schedule=PLACES, restore=choice)
    x = images(model)
    with torch.no_grad():
        expected = model.forward_features(x)
        compiled = torch.compile(model.forward_features, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    """A block under gradient checkpointing."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.reentrant, **kwargs)


@pytest.mark.parametrize("method", ["top_k", "tome", "threshold", "merge_threshold"])
def test_gradients_of_tokens_that_come_back(method: str) -> None:
    """Through what they were when they left; under checkpointing the same, or an error where nothing was recorded."""
    model = build("class_token")
    shares = dict.fromkeys(PLACES, 1.0) if method == "merge_threshold" else PLACES
    with registered():
        tokenprune.patch(model, method, schedule=shares, restore="fusion")
    x = images(model).requires_grad_()
    blocks = list(model.blocks)

    def gradients() -> list[Tensor]:
        weight = torch.randn(2, 1 + patches(model), model.embed_dim, generator=torch.Generator().manual_seed(0))
        (model.forward_features(x) * weight).sum().backward()
        found = [x.grad.clone(), *(p.grad.clone() for b in blocks for p in b.parameters() if p.grad is not None)]
        model.zero_grad()
        x.grad = None
        return found

    plain = gradients()
    model.blocks = nn.Sequential(*(Checkpointed(block, False) for block in blocks))
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    model.blocks = nn.Sequential(*(Checkpointed(block, True) for block in blocks))
    with pytest.raises(UnsupportedModel, match="use_reentrant=False"):
        gradients()


def test_ragged_images_come_back_alone_as_in_a_batch() -> None:
    model = build("class_token")
    x = images(model, 3)
    with registered(), torch.no_grad():
        for method in ("threshold", "merge_threshold"):
            for choice in CHOICES:
                tokenprune.patch(model, method, schedule=dict.fromkeys(PLACES, 1.0), restore=choice)
                features, output = model.forward_features(x), model(x)
                assert tokenprune.report(model).to_dict()["places"][-1]["fewest"] < patches(model)
                for i in range(3):
                    torch.testing.assert_close(
                        features[i : i + 1], model.forward_features(x[i : i + 1]), rtol=1e-4, atol=1e-4
                    )
                    torch.testing.assert_close(output[i : i + 1], model(x[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    model = build("class_token")
    x = images(model, 1)
    plain = run(model, x)
    for wrong in ("nearest", "", 3, ["place"]):
        with pytest.raises(UnsupportedMethod, match="none of 'unmerge', 'regression', 'feature', 'place', 'fusion'"):
            tokenprune.patch(model, "top_k", keep=0.5, restore=wrong)
    for method in ("top_k", "evit", "zero_tprune"):
        with pytest.raises(UnsupportedMethod, match="drops tokens"):
            tokenprune.patch(model, method, keep=0.5, restore="unmerge")
    with pytest.raises(BudgetError, match="the last"):
        tokenprune.patch(model, "tome", schedule={1: 0.5, LAST: 0.5}, restore="fusion")
    with pytest.raises(BudgetError, match="the last"):
        tokenprune.patch(model, "top_k", keep=0.5, places=(LAST,), restore="fusion")
    windows = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(2, 2), img_size=56
    )
    with pytest.raises(UnsupportedMethod, match="restore="):
        tokenprune.patch(windows, "sparsevit", restore="place")
    assert torch.equal(run(model, x), plain)


def test_nearest_in_place_needs_places() -> None:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "patch_size": zoo.PATCH, "pos_embed_grid_size": (4, 6)}
    model = timm.create_model("naflexvit_base_patch16_gap", **shape).eval()
    x = torch.randn(1, 3, 20, 28)
    tokenprune.patch(model, "top_k", keep=0.5, restore="place")
    assert model.forward_features(x).shape[1] == 35 + model.num_prefix_tokens
    flat = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(1, 35, 48)
    places = torch.cartesian_prod(torch.arange(5), torch.arange(7))[None]
    with pytest.raises(UnsupportedModel, match="restore='feature'"):
        model.forward_features(patches=flat, patch_coord=places)
