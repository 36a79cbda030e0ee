"""Promise 5: gradients flow, and gradient checkpointing re-runs a block with the tokens that it had."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import timm.layers
import torch
import zoo
from families import FAMILIES, FEW, FIRST_METHODS, METHODS, build, full_but, images, options, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenprune

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_grads(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5 * max(1.0, float(grad.abs().max())), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_parameters_get_gradients(family: str) -> None:
    model = build(family)
    x = images(model)
    model(x).sum().backward()
    plain = grads(model)
    tokenprune.patch(model, "tome", keep=0.5, **options(family, "tome"))
    model(x).sum().backward()
    reduced = grads(model)
    assert reduced.keys() == plain.keys()
    assert all(torch.isfinite(grad).all() for grad in reduced.values())
    weights = {name for name, grad in plain.items() if grad.count_nonzero()}
    assert {name for name, grad in reduced.items() if grad.count_nonzero()} >= weights - {"pos_embed"}


@pytest.mark.parametrize("method", [method for method in METHODS if method != "evit"])  # it fuses all tokens
def test_gradient_is_that_of_the_tokens_that_are_left(method: str) -> None:
    """Against finite differences, small enough that the choice of tokens stays."""
    model = build("class_token").double()
    x = images(model, 1).double()
    tokenprune.patch(model, method, keep=0.5)
    weight = model.blocks[1].mlp.fc1.weight
    model(x).square().sum().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (weight.grad * direction).sum()
    values = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):
            weight += step * direction
            values.append(model(x).square().sum())
    torch.testing.assert_close((values[0] - values[1]) / 2e-7, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FEW)
def test_identity_of_gradients_at_full_budget(family: str) -> None:
    model = build(family)
    x = images(model)
    model(x).sum().backward()
    plain = grads(model)
    tokenprune.patch(model, "top_k", schedule=dict.fromkeys(range(4), 1.0))
    model(x).sum().backward()
    assert_same_grads(grads(model), plain)


def dynamic(name: str) -> nn.Module:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4}
    model = timm.create_model(name, dynamic_img_size=True, num_classes=5, **shape)
    zoo.randomise(model, 0)
    return model.train()


def pictures(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@MODES
@pytest.mark.parametrize("method", full_but(FIRST_METHODS, METHODS))
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224"])
def test_two_forwards_of_different_sizes_then_one_backward(
    name: str, method: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "vit_small_patch16_dinov3" and method not in ("tome", "top_k"):
        return
    model = tokenprune.patch(dynamic(name), method, keep=0.5)
    first, second = pictures(20, 28), pictures(28, 36, batch=3)

    def step() -> dict[str, Tensor]:
        (model(first).square().mean() + model(second).square().mean()).backward()
        return grads(model)

    expected = step()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    reruns = count_calls(model.blocks[1].mlp)
    assert_same_grads(step(), expected)
    assert len(reruns) == 4  # two forwards, two re-runs
    assert len({tokens for _, tokens, _ in reruns}) == 2


def count_calls(module: nn.Module) -> list[tuple[int, int, int]]:
    seen: list[tuple[int, int, int]] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    return seen


KEYWORD_BLOCKS = {
    "rotary",
    "rotary_registers",
    "rotary_mixed",
    "bias_own_table",
    "bias_own_mlp",
    "bias_shared",
    "naflex",
}


@MODES
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_of_every_family(family: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenprune.patch(build(family), "tome", keep=0.5, **options(family, "tome")).train()
    x = images(model)
    torch.manual_seed(1)  # some hosts drop out in their position bias
    model(x).square().mean().backward()
    expected = grads(model)
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    torch.manual_seed(1)
    if reentrant and family in KEYWORD_BLOCKS:  # torch's own limit: a re-entrant checkpoint takes no keywords
        with pytest.raises(ValueError, match="Unexpected keyword"):
            model(x)
        return
    model(x).square().mean().backward()
    assert_same_grads(grads(model), expected)


class EachBlock(nn.Module):
    """Checkpoints one block at a time by hand, as training scripts do."""

    def __init__(self, block: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.block, self.kwargs = block, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, **self.kwargs)  # type: ignore[no-any-return]


@MODES
def test_blocks_wrapped_after_the_patch(reentrant: bool) -> None:
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5)
    x = images(model)
    model(x).square().mean().backward()
    expected = list(grads(model).values())
    model.blocks = nn.Sequential(*(EachBlock(block, use_reentrant=reentrant) for block in model.blocks))
    model(x).square().mean().backward()
    for got, grad in zip(grads(model).values(), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)


@MODES
def test_another_forward_between_forward_and_backward(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation, an unrelated model, and a copy run before the backward pass leaves no trace in the gradients."""
    model = tokenprune.patch(dynamic("vit_tiny_patch16_224"), "tome", keep=0.5)
    other = tokenprune.patch(build("rotary"), "top_k", keep=0.5)
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    model(pictures(20, 28)).square().mean().backward()
    expected = grads(model)
    loss = model(pictures(20, 28)).square().mean()
    run(model, pictures(36, 20, batch=5))
    model.forward_features(pictures(28, 28))
    run(other, images(other))
    run(copy.deepcopy(other), images(other))
    loss.backward()
    assert_same_grads(grads(model), expected)


@MODES
@pytest.mark.parametrize("method", ["tome", "top_k"])
def test_dense_outputs_under_checkpointing(method: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenprune.patch(build("class_token"), method, keep=0.5).train()
    x = images(model)

    def step() -> dict[str, Tensor]:
        final, inner = model.forward_intermediates(x, indices=[1, 3])
        (final.square().mean() + sum(i.square().mean() for i in inner)).backward()
        return grads(model)

    expected = step()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    if reentrant:
        with pytest.raises(tokenprune.UnsupportedModel, match="use_reentrant=False"):
            step()
    else:
        assert_same_grads(step(), expected)


@MODES
def test_recording_is_not_doubled_by_the_re_run(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5).train()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    with tokenprune.record(model) as recording:
        model(images(model)).sum().backward()
    assert len(recording.forwards) == 1
    assert [place.name for place in recording.forwards[0].places] == [f"blocks.{i}" for i in range(4)]


def test_pickle_and_deepcopy_right_after_a_step() -> None:
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5).train()
    model.set_grad_checkpointing(True)
    x = images(model)
    model(x).sum().backward()
    loss = model(x).sum()  # and with a graph still alive
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin.eval(), x), run(model.eval(), x))
        model.train()
    loss.backward()


def test_training_leaves_statistics_and_generators_alone() -> None:
    """Patching a model in training mode must not run its batch norms or draw random numbers."""
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=96, num_heads=4, img_size=20, patch_size=4, drop_path_rate=0.3,
        norm_layer="layernorm", proj_drop_rate=0.2,
    ).train()  # fmt: skip
    model.patch_embed.norm = PerChannel(96)
    model.blocks[1].norm2 = PerChannel(96)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    state = torch.get_rng_state()
    tokenprune.patch(model, "zero_tprune", flops=0.6)
    tokenprune.report(model)
    tokenprune.methods(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class PerChannel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_training_run_learns() -> None:
    model = tokenprune.patch(build("class_token"), "tome", flops=0.6).train()
    x, labels = images(model, 8), torch.arange(8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_functional_transforms() -> None:
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5)
    x = images(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, parameters, (x,))
        return output.square().mean()

    gradient = torch.func.grad(loss)(parameters, x)
    model(x).square().mean().backward()
    assert_same_grads(gradient, grads(model))
    scaled = {name: p * 1.1 for name, p in parameters.items()}
    with torch.no_grad():
        assert not torch.equal(torch.func.functional_call(model, scaled, (x,)), model(x))


@pytest.mark.parametrize("method", ["top_k", "tome", "zero_tprune", "evit"])
def test_vmap_over_images(method: str) -> None:
    model = tokenprune.patch(build("class_token"), method, keep=0.5)
    x = images(model)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda image: model(image.unsqueeze(0)), randomness="same")(x)
        torch.testing.assert_close(mapped[:, 0], model(x), rtol=1e-4, atol=1e-4)
