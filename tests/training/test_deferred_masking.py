"""`deferred_masking`: behind the mixer a training forward is that of the kept patches alone, and so is the loss."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import denoisers_zoo
import pytest
import torch
from denoisers_zoo import nothing_is_left
from families import full_but
from hidden_keys import hidden
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokenprune

torch.set_num_threads(1)
KEEP = 0.3


def build(name: str) -> tuple[Any, Any]:
    model, inputs = denoisers_zoo.build(name)
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # it would draw, and from the same generator
    return model, inputs


def sizes(name: str) -> tuple[int, int, int]:
    return (3, 14, 14) if name == "dit" else (3, 14, 10)  # grids of 7 x 7, which a DiT wants square, and 7 x 5


def predicted(model: Any, call: dict[str, Any]) -> Tensor:
    out: Tensor = model(**call, return_dict=False)[0]
    return out


def hand_mse(prediction: Tensor, target: Tensor, kept: Tensor, columns: int) -> Tensor:
    """Patch by patch, over patches of 2 x 2."""
    total = prediction.new_zeros(())
    for image in range(len(kept)):
        for token in kept[image].tolist():
            row, column = 2 * (token // columns), 2 * (token % columns)
            a, b = (x[image, :, row : row + 2, column : column + 2] for x in (prediction, target))
            total = total + ((a - b) ** 2).mean()
    return total / kept.numel()


def gradients(model: nn.Module, latents: Tensor, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    latents.grad = None
    loss.backward()
    return [latents.grad, *(p.grad for p in model.parameters())]


def assert_all_close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_a_step_is_that_of_the_kept_patches_behind_the_mixer(name: str) -> None:
    model, inputs = build(name)
    call = inputs(*sizes(name))
    latents = call["hidden_states"] = call["hidden_states"].clone().requires_grad_()
    tokenprune.patch(model, "deferred_masking", keep=KEEP)
    torch.manual_seed(5)
    out = predicted(model.train(), call)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    kept = tokenprune.kept_patches(model)
    assert kept is not None
    rows, columns = kept.grid or (0, 0)
    assert (rows, columns) == (7, latents.shape[3] // 2)
    assert kept.index.shape == (3, -(-3 * rows * columns // 10))
    assert len({tuple(row) for row in kept.index.tolist()}) == 3
    loss = tokenprune.masked_mse(out, target, kept)
    torch.testing.assert_close(loss, hand_mse(out, target, kept.index, columns))
    found = gradients(model, latents, loss)
    tokenprune.unpatch(model)
    seen = torch.zeros(3, rows * columns, dtype=torch.bool).scatter(1, kept.index, True)
    block = [-1]
    for number, module in enumerate(model.transformer_blocks):
        module.register_forward_pre_hook(partial(lambda number, *_: block.__setitem__(0, number), number))
    with hidden(seen, when=lambda: block[0] >= 1):  # a quarter of four blocks is the mixer
        whole = predicted(model, call)
    mask = kept.mask(whole)
    torch.testing.assert_close(out * mask, whole * mask, rtol=1e-4, atol=1e-4)
    assert_all_close(found, gradients(model, latents, hand_mse(whole, target, kept.index, columns)))


def test_dropped_patches_teach_the_mixer_alone() -> None:
    model, inputs = build("dit")
    tokenprune.patch(model, "deferred_masking", keep=KEEP)
    sums: dict[int, Tensor] = {}
    for number in (0, 1):
        model.transformer_blocks[number].register_full_backward_hook(
            partial(lambda number, _, into, out: sums.__setitem__(number, out[0].abs().sum(-1)), number)
        )
    out = predicted(model.train(), inputs(2, 14, 14))
    kept = tokenprune.kept_patches(model)
    assert kept is not None
    tokenprune.masked_mse(out, torch.zeros_like(out), kept).backward()
    moved = sums[1] > 0  # behind the first block that computes the kept ones
    assert torch.equal(moved, torch.zeros_like(moved).scatter(1, kept.index, True))
    assert bool((model.pos_embed.proj.weight.grad.abs() > 0).all())


@pytest.mark.parametrize("name", ["dit", "flux", *(pytest.param(n, marks=pytest.mark.full) for n in ("sd3", "wan"))])
def test_in_eval_mode_nothing_is_changed(name: str) -> None:
    model, inputs = build(name)
    call = inputs(2, 16, 16) if name == "dit" else inputs(2, 16, 12)
    with torch.no_grad():
        expected, state = predicted(model, call), torch.get_rng_state()
        tokenprune.patch(model, "deferred_masking")
        assert torch.equal(predicted(model, call), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert tokenprune.kept_patches(model) is None
        assert not torch.allclose(predicted(model.train(), call), expected, rtol=1e-2)
        assert torch.equal(predicted(model.eval(), call), expected)
        tokenprune.unpatch(model)
        assert nothing_is_left(model)
        assert torch.equal(predicted(model, call), expected)


def test_all_rows_of_blocks_keep_the_same_and_a_shared_rotary_table_keeps_the_same_in_all_images() -> None:
    model, inputs = build("flux")  # two double blocks and three single ones: the mixer is the first
    tokenprune.patch(model, "deferred_masking", keep=KEEP)
    with tokenprune.record(model) as recording:
        out = predicted(model.train(), inputs(3, 16, 12))
    places = {place.name: place.kept for place in recording.forwards[0].places}
    assert list(places) == ["transformer_blocks.1-1", "single_transformer_blocks.0-2"]
    first, second = places.values()
    assert torch.equal(first, second)
    assert torch.equal(first, first[:1].expand_as(first))
    kept = tokenprune.kept_patches(model)
    assert kept is not None
    assert torch.equal(kept.index, first)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([(out[i, row] - target[i, row]) ** 2 for i, row in enumerate(kept.index)]).mean()
    torch.testing.assert_close(tokenprune.masked_mse(out, target, kept), expected)
    assert any("the same patches" in note for note in tokenprune.report(model).to_dict()["notes"])


def test_the_report_counts_a_training_forward() -> None:
    model, _ = build("dit")
    tokenprune.patch(model, "deferred_masking")
    call = build("dit")[1](2, 16, 16)
    predicted(model.train(), call)
    data = tokenprune.report(model).to_dict()
    assert data["places"] == [
        {"name": "transformer_blocks.1-3", "tokens_in": 64, "tokens_out": 16, "steps": "every step"}
    ]
    assert "the patch mixer" in data["skipped"]["transformer_blocks.0-0"]
    width = 8  # a token's projections and MLP, its attention to `n`
    saved = 3 * (64 * (12 * width**2 + 2 * 64 * width) - 16 * (12 * width**2 + 2 * 16 * width))
    assert data["flops_before"] - data["flops_after"] == saved


@pytest.mark.parametrize(("mixer", "whole"), [(0.25, 1), (0.5, 2), (0.01, 1), (0.99, 3)])
def test_the_mixer_is_a_share_of_the_blocks(mixer: float, whole: int) -> None:
    model, inputs = build("dit")
    tokenprune.patch(model, "deferred_masking", mixer=mixer)
    predicted(model.train(), inputs(1, 16, 16))
    assert tokenprune.report(model).to_dict()["places"][0]["name"] == f"transformer_blocks.{whole}-3"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_patches(reentrant: bool) -> None:
    model, inputs = build("dit")
    tokenprune.patch(model, "deferred_masking", keep=KEEP)
    call = inputs(2, 16, 16)
    latents = call["hidden_states"] = call["hidden_states"].clone().requires_grad_()
    found = []
    for on in (False, True):
        if on:
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        torch.manual_seed(5)
        outs = [predicted(model.train(), one) for one in (call, {**call, "hidden_states": 2 * latents})]
        found.append(gradients(model, latents, sum(out.square().mean() for out in outs)))  # type: ignore[arg-type]
    assert_all_close(found[1], found[0])


def test_a_checkpoint_of_the_whole_model_is_refused() -> None:
    model, inputs = build("dit")
    tokenprune.patch(model, "deferred_masking")
    call = inputs(1, 16, 16)
    latents = call.pop("hidden_states").requires_grad_()
    out = checkpoint(lambda x: predicted(model.train(), {"hidden_states": x, **call}), latents, use_reentrant=False)
    with pytest.raises(tokenprune.UnsupportedModel, match="enable_gradient_checkpointing"):
        out.sum().backward()


def test_a_mask_of_another_forward_is_refused() -> None:
    model, inputs = build("dit")
    assert tokenprune.kept_patches(model) is None
    tokenprune.patch(model, "deferred_masking")
    model.train()
    with pytest.raises(tokenprune.TokenPruneError, match="no training forward"):
        tokenprune.kept_patches(model)
    out = predicted(model, inputs(2, 16, 16))
    kept = tokenprune.kept_patches(nn.ModuleDict({"inside": model}))
    for wrong, why in ((out[:1], "a batch of 1"), (out[..., :9], "not known where"), (out[:, :, 0], "not known where")):
        with pytest.raises(tokenprune.TokenPruneError, match=why):
            tokenprune.masked_mse(wrong, torch.zeros_like(wrong), kept)
    with pytest.raises(tokenprune.TokenPruneError, match="no error to a target"):
        tokenprune.masked_mse(out, out[:1], kept)
    variance = out.chunk(2, 1)[0]  # a learned variance left out
    assert tokenprune.masked_mse(variance, torch.zeros_like(variance), kept).isfinite()
    assert torch.equal(tokenprune.masked_mse(out, 2 * out, None), nn.functional.mse_loss(out, 2 * out))


def test_a_mean_for_each_image() -> None:
    kept = tokenprune.kept_patches.__globals__["KeptPatches"](torch.tensor([[0, 3], [1, 2]]), 4, (2, 2))
    values = torch.arange(32.0).reshape(2, 1, 4, 4)
    first = [values[0, 0, :2, :2].mean() / 2 + values[0, 0, 2:, 2:].mean() / 2]
    second = [values[1, 0, :2, 2:].mean() / 2 + values[1, 0, 2:, :2].mean() / 2]
    torch.testing.assert_close(kept.mean(values), torch.stack(first + second))
    values[0, 0, 0, 3] = torch.nan  # of a patch that nobody asks for
    assert kept.mean(values).isfinite().all()


def test_every_step_drops_others_and_a_copy_drops_for_itself() -> None:
    model, inputs = build("dit")
    tokenprune.patch(model, "deferred_masking")
    call = inputs(2, 16, 16)
    masks = []
    for one in (model.train(), model, copy.deepcopy(model)):
        predicted(one, call)
        masks.append(tokenprune.kept_patches(one).index)  # type: ignore[union-attr]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    assert torch.equal(tokenprune.kept_patches(model).index, masks[1])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", full_but(("unet_sd",), ("unet_sd", "unet_sdxl")))
def test_what_cannot_be_is_refused(name: str) -> None:
    unet, _ = build(name)
    with pytest.raises(tokenprune.UnsupportedMethod, match="needs mixer blocks"):
        tokenprune.patch(unet, "deferred_masking")
    model, _ = build("dit")
    for options in ({"mixer": 0.0}, {"mixer": 1}, {"color": "pink"}, {"steps": {}}):
        with pytest.raises(tokenprune.UnsupportedMethod):
            tokenprune.patch(model, "deferred_masking", **options)
    model.transformer_blocks = model.transformer_blocks[:1]
    with pytest.raises(tokenprune.UnsupportedMethod, match="applied nowhere"):
        tokenprune.patch(model, "deferred_masking")
