"""Promises 1, 3, 6 and 7 for methods that keep a different number of tokens in each image."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
import zoo
from adaptive import RAGGED, registered
from families import FEW, build, images, patches, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tokenprune

BATCH = 4
PLACES = {1: 1.0, 2: 1.0}


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    with registered():
        yield


def kept(model: nn.Module, x: Tensor, call: Any = None) -> list[list[list[int]]]:
    """Original patches that leave each place, of each image."""
    with torch.no_grad(), tokenprune.record(model) as recording:
        (call or model)(x)
    return [[[p for p in image if p >= 0] for image in place.kept.tolist()] for place in recording.forwards[-1].places]


def assert_ragged(model: nn.Module) -> None:
    """The last forward kept different numbers of tokens, not all of any image."""
    report = tokenprune.report(model).to_dict()
    assert any(place["fewest"] < place["most"] for place in report["places"]), report["places"]
    assert report["places"][-1]["most"] < report["tokens"], report["places"]


@pytest.mark.parametrize("family", RAGGED)
def test_budget_of_one_is_bit_identical(family: str) -> None:
    model = build(family)
    x = images(model)
    plain = run(model, x)
    for budget in ({"keep": 1.0}, {"flops": 1.0}):
        tokenprune.patch(model, "ats", **budget)
        assert torch.equal(run(model, x), plain)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == 1.0


@pytest.mark.parametrize("family", RAGGED)
def test_a_packed_batch_that_keeps_all_is_bit_identical(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    x = images(model, 3)
    plain, features = run(model, x), model.forward_features(x)
    tokenprune.patch(model, "threshold", schedule=dict.fromkeys(range(4), 1.0), times=0.0)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    assert torch.equal(run(model, x), plain)
    tokens = patches(model) + shapes[0][1] - patches(model)
    assert [shape[:2] for shape in shapes] == [(3, tokens)] + 3 * [(1, 3 * tokens)]
    assert torch.equal(model.forward_features(x), features)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("family", RAGGED)
def test_an_image_is_that_of_a_fixed_method(family: str) -> None:
    """What is above a threshold are the top k, for a k of each image: outputs and dense features as at that k."""
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule=PLACES, times=0.7)
    out, features = run(model, x), model.forward_features(x)
    assert_ragged(model)
    left = kept(model, x)
    fixed = build(family)
    for i in range(BATCH):
        first, second = len(left[0][i]), len(left[1][i])
        tokenprune.patch(fixed, "top_k", schedule={1: first / patches(model), 2: second / first})
        one = x[i : i + 1]
        assert kept(fixed, one) == [[place[i]] for place in left]
        torch.testing.assert_close(out[i], run(fixed, one)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[i], fixed.forward_features(one)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", RAGGED)
def test_merging_is_that_of_a_fixed_method(family: str) -> None:
    """Pairs above a threshold are the most similar m, for an m of each image; ToMe leaves them in another order."""
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "merge_threshold", schedule={1: 1.0})
    out, features = run(model, x), model.forward_features(x)
    assert_ragged(model)
    left = kept(model, x)
    fixed = build(family)
    for i in range(BATCH):
        tokenprune.patch(fixed, "tome", schedule={1: len(left[0][i]) / patches(model)})
        one = x[i : i + 1]
        assert sorted(kept(fixed, one)[0][0]) == left[0][i]
        torch.testing.assert_close(out[i], run(fixed, one)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[i], fixed.forward_features(one)[0], rtol=1e-4, atol=1e-4)


# Those of random models are not much alike, and what they have in common makes them so with depth.
NEAR: dict[str, dict[str, Any]] = {"saint": {"threshold": 0.5, "neighbours": 2}, "algm": {"threshold": 0.5}}


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in RAGGED for method in ("ats", "merge_threshold")]
    + [
        pytest.param(family, method, marks=[] if family in FEW else pytest.mark.full)
        for family in RAGGED
        for method in NEAR
    ],
)
def test_an_image_does_not_depend_on_its_mates(family: str, method: str) -> None:
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, method, schedule={0: 1.0, 1: 1.0, 2: 1.0}, **NEAR.get(method, {}))
    state = torch.get_rng_state()
    together, left = run(model, x), kept(model, x)
    assert_ragged(model)
    for i in range(BATCH):
        one = x[i : i + 1]
        assert kept(model, one) == [[place[i]] for place in left]
        torch.testing.assert_close(run(model, one)[0], together[i], rtol=1e-4, atol=1e-5)
    flipped = run(model, x.flip(0)).flip(0)
    torch.testing.assert_close(flipped, together, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(model, x), together)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["ats", *NEAR])
def test_promises_of_every_adaptive_method(method: str) -> None:
    """The identity at 1.0, no trace behind `unpatch`, NaN for its image alone, batches of none and of one, copies."""
    model = build("class_token")
    x = images(model, 3)
    plain, features = run(model, x), model.forward_features(x)
    tokenprune.patch(model, method, keep=1.0)
    assert torch.equal(run(model, x), plain)
    tokenprune.patch(model, method, keep=0.6, **NEAR.get(method, {}))
    out = run(model, x)
    assert not torch.equal(out, plain)
    assert model.forward_features(x).shape == features.shape
    assert all(len(image) <= 21 for image in kept(model, x)[-1])
    broken = x.clone()
    broken[1] = float("nan")
    got = run(model, broken)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2]], out[[0, 2]], rtol=1e-4, atol=1e-5)
    assert run(model, x[:0]).shape == (0, out.shape[1])
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), out)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("family", RAGGED)
def test_a_batch_costs_what_its_tokens_cost(family: str) -> None:
    """Every linear layer of a block behind a place sees the tokens that are left, and no padding."""
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule={1: 1.0}, times=0.7)
    left = sum(len(image) for image in kept(model, x)[0])
    rows: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

    for name, module in model.blocks[2].named_modules():
        if isinstance(module, nn.Linear) and "rel_pos" not in name:
            module.register_forward_pre_hook(partial(count, name))
    run(model, x)
    assert len(rows) >= 2
    assert set(rows.values()) == {left + model.num_prefix_tokens * BATCH}


class AttentionCalls(TorchFunctionMode):
    """(batch, tokens) of every call of torch's attention, none of them with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.shapes.append((args[0].shape[0], args[0].shape[2]))
            assert (kwargs or {}).get("attn_mask") is None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["rotary_registers", "class_token"])
def test_attention_is_called_once_for_each_length(family: str) -> None:
    """By torch's own function, so that the user's backend stays in use, without a mask and without padding."""
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule={1: 1.0}, times=0.7)
    lengths = sorted(len(image) + model.num_prefix_tokens for image in kept(model, x)[0])
    with AttentionCalls() as calls:
        run(model, x)
    whole = (BATCH, patches(model) + model.num_prefix_tokens)
    behind = [(lengths.count(length), length) for length in sorted(set(lengths))]
    assert calls.shapes == 2 * [whole] + 2 * behind


def test_an_attention_that_the_user_replaced_runs_once_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to answer then: the replacement runs, and sees no packed sequence."""
    model = build("rotary_registers")
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule={1: 1.0}, times=0.7)
    expected = run(model, x)
    tokens: list[int] = []

    def replaced(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        tokens.append(q.shape[2])
        return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
    torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-5)
    assert max(tokens) == patches(model) + model.num_prefix_tokens
    assert len(tokens) > 4


@pytest.mark.parametrize("family", RAGGED)
def test_intermediates_are_the_full_grid(family: str) -> None:
    model = build(family)
    x = images(model, BATCH)
    plain = model.forward_intermediates(x, intermediates_only=True)
    tokenprune.patch(model, "threshold", schedule=PLACES, times=0.7)
    restored = model.forward_intermediates(x, intermediates_only=True)
    assert [one.shape for one in restored] == [one.shape for one in plain]
    left = kept(model, x, lambda x: model.forward_intermediates(x))
    torch.testing.assert_close(restored[0], plain[0], rtol=1e-4, atol=1e-4)
    fixed = build(family)
    for image in range(BATCH):
        first, second = len(left[0][image]), len(left[1][image])
        tokenprune.patch(fixed, "top_k", schedule={1: first / patches(model), 2: second / first})
        alone = fixed.forward_intermediates(x[image : image + 1], intermediates_only=True)
        for one, other in zip(restored, alone, strict=True):
            torch.testing.assert_close(one[image], other[0], rtol=1e-4, atol=1e-4)


def test_a_loop_over_the_blocks_ends_on_the_full_grid() -> None:
    model = build("mean_pool")
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule=PLACES, times=0.7)
    features = model.forward_features(x)
    h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks:
        h = block(h)
    assert torch.equal(model.norm(h), features)


def test_a_model_that_lost_its_last_blocks() -> None:
    model = build("mean_pool")
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule={1: 1.0}, times=0.7)
    model.blocks = model.blocks[:3]
    out = run(model, x)
    assert_ragged(model)
    for i in range(BATCH):
        torch.testing.assert_close(run(model, x[i : i + 1])[0], out[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_a_hook_fires_once_and_sees_the_tokens_that_are_left(family: str) -> None:
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule={1: 1.0}, times=0.7)
    seen: list[tuple[int, ...]] = []
    attended: list[tuple[int, ...]] = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.blocks[2].attn.register_forward_hook(lambda module, args, out: attended.append(tuple(out.shape)))
    run(model, x)
    total = sum(len(image) + model.num_prefix_tokens for image in kept(model, x)[0])
    assert seen == attended == 2 * [(1, total, 96)]


@pytest.mark.parametrize("family", RAGGED)
def test_the_report_is_what_torch_counts(family: str) -> None:
    model = build(family)
    x = images(model, BATCH)
    before = tokenprune.report(tokenprune.patch(model, "threshold", schedule=PLACES, times=0.7)).to_dict()
    assert "most" in " ".join(before["notes"])
    run(model, x)
    report = tokenprune.report(model).to_dict()
    model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for image in x:  # alone: a batch shares what a relative position bias costs
            model(image[None])
    assert report["flops_after"] == pytest.approx(counter.get_total_flops() / 2 / BATCH, rel=1e-3)
    assert report["flops_after"] < before["flops_after"]


@pytest.mark.parametrize("family", ["class_token", "rotary_registers"])
def test_the_report_by_hand(family: str) -> None:
    """The closed formula of a pre-norm block, for the tokens that recordings show."""
    model = build(family)
    x = images(model, BATCH)
    tokenprune.patch(model, "threshold", schedule=PLACES, times=0.7)
    left, n, prefix = kept(model, x), patches(model), model.num_prefix_tokens
    width, hidden = 96, model.blocks[0].mlp.fc1.out_features
    saved = 0.0
    for image in range(BATCH):
        at_attention = [n, n, len(left[0][image]), len(left[1][image])]
        at_mlp = [n, len(left[0][image]), len(left[1][image]), len(left[1][image])]
        for a, m in zip(at_attention, at_mlp, strict=True):
            whole, part = n + prefix, a + prefix
            saved += 4 * (whole - part) * width**2 + 2 * width * (whole**2 - part**2) + 2 * (n - m) * width * hidden
        saved -= sum(a + prefix for a in at_attention[1:3]) * width  # a place reads one row of attention
    report = tokenprune.report(model).to_dict()
    assert report["flops_after"] == pytest.approx(report["flops_before"] - saved / BATCH, rel=1e-4)
    assert [place["tokens_out"] for place in report["places"]] == [
        round(sum(len(image) for image in place) / BATCH, 1) for place in left
    ]


def test_other_sizes_and_batches() -> None:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4, "num_classes": 5}
    model = timm.create_model("vit_small_patch16_dinov3", dynamic_img_size=True, **shape).eval()
    zoo.randomise(model, 0)
    tokenprune.patch(model, "ats")
    for size in ((20, 28), (28, 20), (8, 12), (4, 4)):
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        together = run(model, x)
        for i in range(3):
            torch.testing.assert_close(run(model, x[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
