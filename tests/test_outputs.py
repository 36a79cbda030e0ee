"""Promise 3: outputs keep shape and meaning: dense ones come back on the full grid, pooled ones see what is left."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import zoo
from families import FAMILIES, FEW, build, images, options, patches, run
from torch import Tensor, nn

import tokenprune
from tokenprune.state import flow

LAST = 3  # index of the last block


def kept_in(model: nn.Module, x: Tensor, call: Any = None) -> Tensor:
    """Original patches that leave the last place, [B, K]."""
    with tokenprune.record(model) as recording:
        (call or model)(x)
    return recording.forwards[0].places[-1].kept


def flat(features: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H * W, C]."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_features_is_the_full_grid_in_order(family: str) -> None:
    """Tokens dropped in the last block: those kept have their unpatched values at their own positions."""
    model = build(family)
    x = images(model)
    plain = model.forward_features(x)
    tokenprune.patch(model, "top_k", schedule={LAST: 0.5})
    features = model.forward_features(x)
    assert features.shape == plain.shape
    prefix = plain.shape[1] - patches(model)
    if family != "talking_heads":  # CaiT reads its class token off the patch tokens
        torch.testing.assert_close(features[:, :prefix], plain[:, :prefix], rtol=1e-4, atol=1e-4)
    kept = kept_in(model, x, model.forward_features)
    for i in range(len(x)):
        body, reference = features[i, prefix:], plain[i, prefix:]
        torch.testing.assert_close(body[kept[i]], reference[kept[i]], rtol=1e-4, atol=1e-4)
        assert len(kept[i]) < len(body)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_patches_get_the_value_of_their_group(family: str) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "tome", keep=0.4, **options(family, "tome"))
    with tokenprune.record(model) as recording:
        features = model.forward_features(x)
    prefix = features.shape[1] - patches(model)
    source = recording.forwards[0].places[-1].source
    for i in range(len(x)):
        body = features[i, prefix:]
        same = (body[:, None] == body[None]).all(-1)
        assert torch.equal(same, source[i][:, None] == source[i][None])


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_intermediates(family: str) -> None:
    model = build(family)
    x = images(model)
    cases: list[dict[str, Any]] = [
        {"indices": None},
        {"indices": 2},
        {"indices": [0, 2]},
        {"indices": [-1]},
        {"indices": [0, 1], "stop_early": True, "intermediates_only": True},
        {"norm": True},
        {"intermediates_only": True},
    ]
    if family != "talking_heads":
        cases.append({"output_fmt": "NLC"})
        if model.num_prefix_tokens:
            cases.append({"return_prefix_tokens": True, "output_fmt": "NLC"})
    if family == "naflex":
        cases.append({"output_dict": True})
    plain = [model.forward_intermediates(x, **case) for case in cases]
    tokenprune.patch(model, "tome", schedule={1: 0.7, 2: 0.7}, **options(family, "tome"))
    features = model.forward_features(x)
    for case, reference in zip(cases, plain, strict=True):
        got = model.forward_intermediates(x, **case)
        assert shapes(got) == shapes(reference), case
        if not case.get("intermediates_only") and not case.get("output_dict"):
            torch.testing.assert_close(got[0], features)
        wanted = case.get("indices", None)
        if isinstance(wanted, list) and wanted[0] == 0:
            inter, unpatched = (y if case.get("intermediates_only") else y[1] for y in (got, reference))
            assert torch.equal(inter[0], unpatched[0])  # nothing is reduced in block 0
            assert not torch.equal(inter[1], unpatched[1])


def shapes(value: Any) -> Any:
    """The shapes in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [shapes(item) for item in value]
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_intermediates_are_the_tokens_that_the_blocks_computed(family: str) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "top_k", schedule={0: 0.8, 2: 0.6})
    seen: dict[int, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: seen.__setitem__(i, (args[0] if args else kwargs["x"])), with_kwargs=True
        )
        for i, block in enumerate(model.blocks)
    ]
    run(model, x)
    for handle in handles:
        handle.remove()
    with tokenprune.record(model) as recording, torch.no_grad():
        got = model.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True)
    prefix = seen[0].shape[1] - patches(model)
    for index, place in ((0, 0), (1, 0), (2, 1)):
        full = flat(got[index])
        kept = recording.forwards[0].places[place].kept
        own = full.gather(1, kept.unsqueeze(-1).expand(-1, -1, full.shape[-1]))
        assert seen[index + 1].shape[1] == prefix + kept.shape[1] < seen[0].shape[1]
        assert torch.equal(own, seen[index + 1][:, prefix:])


@pytest.mark.parametrize(
    "family",
    [
        "class_token",
        "registers",
        "distilled",
        "map_pool",
        "mean_pool",
        "hybrid",
        "post_norm",
        "parallel_scaling",
        "parallel_things",
        "differential",
        "differential_parallel",
    ],
)
def test_get_intermediate_layers(family: str) -> None:
    model = build(family)
    x = images(model)
    cases: list[dict[str, Any]] = [
        {"n": 2},
        {"n": [1, 3], "reshape": True},
        {"n": 3, "norm": True},
        {"n": 1, "return_prefix_tokens": True},
    ]
    plain = [model.get_intermediate_layers(x, **case) for case in cases]
    tokenprune.patch(model, "top_k", keep=0.5)
    for case, reference in zip(cases, plain, strict=True):
        assert shapes(list(model.get_intermediate_layers(x, **case))) == shapes(list(reference))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_features_only(name: str) -> None:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4}
    model = timm.create_model(name, features_only=True, out_indices=(1, 3), **shape).eval()
    zoo.randomise(model, 0)
    x = torch.randn(2, 3, 20, 28)
    plain = model(x)
    tokenprune.patch(model, "top_k", keep=0.5)
    got = model(x)
    assert shapes(got) == shapes(plain) == [(2, 96, 5, 7), (2, 96, 5, 7)]
    assert not torch.equal(got[1], plain[1])
    tokenprune.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), plain, strict=True))


@pytest.mark.parametrize("family", ["class_token", "rotary", "bias_own_table", "bias_shared", "naflex"])
def test_pruned_to_fewer_blocks_after_the_patch(family: str) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "top_k", schedule={0: 0.8, 1: 0.8})
    whole = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    model.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], whole[0])
    assert model(x).shape[1] == model.forward_features(x).shape[1] >= patches(model)
    tokenprune.unpatch(model)
    model(x)


def with_pool(pool: str, **kwargs: Any) -> nn.Module:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, "num_classes": 11}
    model = timm.create_model("vit_tiny_patch16_224", global_pool=pool, **{**shape, **kwargs}).eval()
    zoo.randomise(model, 0)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 20, 28)}
    return model


@pytest.mark.parametrize("method", ["top_k", "tome"])
@pytest.mark.parametrize(
    ("pool", "class_token"),
    [("token", True), *((pool, own) for pool in ("", "avg", "max", "avgmax", "map", "prr") for own in (True, False))],
)
def test_pooling_variants(pool: str, method: str, class_token: bool) -> None:
    """Merging: as if over the full grid, where each patch has its group's value; dropping: over the tokens that are
    left."""
    model = with_pool(pool, class_token=class_token)
    x = images(model)
    shape = run(model, x).shape
    tokenprune.patch(model, method, keep=0.5)
    features = model.forward_features(x)
    assert features.shape[1] == 35 + class_token
    with tokenprune.record(model) as recording:
        got = model(x)
    assert got.shape == shape
    if method == "top_k" and pool:
        kept = recording.forwards[0].places[-1].kept + int(class_token)
        if class_token:
            kept = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept], 1)
        features = features.gather(1, kept.unsqueeze(-1).expand(-1, -1, 96))
    torch.testing.assert_close(got, model.forward_head(features), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_counts_every_patch_in_every_family(family: str) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "tome", keep=0.4, **options(family, "tome"))
    whole = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-4)


def test_pooling_changed_after_the_patch() -> None:
    model = build("class_token")
    x = images(model)
    tokenprune.patch(model, "top_k", keep=0.5)
    pooled = model(x)
    features = model.forward_features(x)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 36, 96)
    assert torch.equal(model(x), features)
    model.reset_classifier(7, "token")
    assert model(x).shape == (2, 7)
    assert pooled.shape == (2, 1000)


@pytest.mark.parametrize("family", FEW)
def test_prefix_tokens_never_leave(family: str) -> None:
    model = build(family)
    x = images(model)
    tokenprune.patch(model, "random", tokens=1)
    assert model(x).shape == (2, *run(model, x).shape[1:])
    with tokenprune.record(model) as recording:
        run(model, x)
    for place in recording.forwards[0].places:
        assert place.kept.min() >= 0
        assert place.kept.max() < patches(model)
    assert recording.forwards[0].places[-1].kept.shape == (2, 1)


class ReadsPatches(timm.models.vision_transformer.VisionTransformer):
    """A user's own: what it returns is read off every patch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 1:]


def test_a_forward_of_the_users_own_reads_the_full_grid() -> None:
    torch.manual_seed(0)
    model = ReadsPatches(img_size=80, embed_dim=48, num_heads=3, depth=6).eval()
    x = torch.randn(2, 3, 80, 80)
    plain = model(x)
    tokenprune.patch(model, "top_k", schedule={5: 0.5})
    patched = model(x)
    assert patched.shape == plain.shape
    with tokenprune.record(model) as recording:
        model(x)
    kept = recording.forwards[0].places[-1].kept
    for i in range(2):
        torch.testing.assert_close(patched[i, kept[i]], plain[i, kept[i]], rtol=1e-4, atol=1e-4)
    tokenprune.patch(model, "tome", flops=0.6)
    assert model(x).shape == plain.shape
    assert abs(tokenprune.report(model).to_dict()["flops_ratio"] - 0.6) < 0.02
    assert torch.equal(tokenprune.unpatch(model)(x), plain)


@pytest.mark.parametrize("entry", ["forward", "forward_features", "forward_intermediates"])
@pytest.mark.parametrize("family", ["class_token", "mean_pool"])
def test_another_patched_model_in_a_hook_leaves_the_outputs_as_they_are(family: str, entry: str) -> None:
    model, other = build(family), build("mean_pool")
    x = images(model)
    tokenprune.patch(model, "tome", keep=0.5)
    tokenprune.patch(other, "top_k", keep=0.6)
    expected, features = run(model, x), model.forward_features(x)
    maps = model.forward_intermediates(x)[1]

    def look(*_: Any) -> None:
        getattr(other, entry)(x)

    for module in (model.patch_embed, model.blocks[1]):
        hook = module.register_forward_hook(look)
        assert torch.equal(run(model, x), expected)
        assert torch.equal(model.forward_features(x), features)
        assert all(map(torch.equal, model.forward_intermediates(x)[1], maps))
        hook.remove()
    assert flow().entry is None
