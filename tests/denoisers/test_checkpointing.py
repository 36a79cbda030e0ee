"""Gradient checkpointing of patched denoisers: the gradients are those without it."""

from functools import partial

import pytest
import torch
from denoisers_zoo import build, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokenprune

torch.set_num_threads(1)
ARGUMENTS = {
    "at_edm": {"keep": 0.4, "steps": {}},
    "random": {"keep": 0.4},
    "tomesd": {"keep": 0.5},
    "todo": {"keep": 0.5},
    "toma": {"keep": 0.25},
}


def switched(model, mode, on=True):
    model.disable_gradient_checkpointing()
    if on:
        model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=mode))


@pytest.mark.parametrize("order", ["patch", "checkpointing"])
@pytest.mark.parametrize(
    ("name", "method", "reentrant"),
    [
        ("pixart", "at_edm", False),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("flux", "random", True),
                ("unet_sdxl", "at_edm", False),
                ("unet_sdxl", "at_edm", True),
                ("unet_sd", "at_edm", False),
                ("flux", "at_edm", False),
                ("sd3", "random", False),
                ("pixart", "toma", False),
                ("pixart", "tomesd", True),
                ("dit", "todo", False),
                ("wan", "random", False),
            )
        ),
    ],
)
def test_gradients_are_those_without_checkpointing(name, method, reentrant, order):
    model, inputs = build(name)
    model.train()
    calls = [inputs(1, 16, 16), inputs(2, 8, 8)] if name == "dit" else [inputs(1, 16, 12), inputs(2, 8, 12)]
    plain = gradients(model, calls)
    if order == "patch":
        tokenprune.patch(model, method, **ARGUMENTS[method])
        expected = gradients(model, calls)
    switched(model, reentrant)
    if order == "checkpointing":
        tokenprune.patch(model, method, **ARGUMENTS[method])
    found = gradients(model, calls)
    switched(model, reentrant, on=False)
    if order == "checkpointing":
        expected = gradients(model, calls)
    assert not torch.allclose(expected[0], plain[0], rtol=1e-2)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))
    tokenprune.unpatch(model)
    switched(model, reentrant)
    for one, other in zip(gradients(model, calls), plain, strict=True):
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize(
    "method", ["region", *(pytest.param(method, marks=pytest.mark.full) for method in ("ras", "toca"))]
)
def test_methods_over_steps_refuse_checkpointing(method):
    model, inputs = build("pixart")
    options = {"mask": torch.eye(8, 6).bool()} if method == "region" else {}
    tokenprune.patch(model, method, **options)
    model.train()
    model.enable_gradient_checkpointing()
    x = inputs(1, 16, 12)
    with pytest.raises(tokenprune.UnsupportedMethod, match=r"model.disable_gradient_checkpointing\(\)"):
        gradients(model, [x])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_whole_model_is_refused(reentrant):
    model, inputs = build("dit")
    tokenprune.patch(model, "random", keep=0.5)
    call = inputs(1, 16, 16)
    call["hidden_states"].requires_grad_()
    arguments = list(call.values())
    out = checkpoint(
        lambda *values: model(**dict(zip(call, values, strict=True)))[0], *arguments, use_reentrant=reentrant
    )
    with pytest.raises(tokenprune.UnsupportedModel, match="enable_gradient_checkpointing"):
        out.sum().backward()


class Grouped(nn.ModuleList):
    """Blocks that a user checkpoints all at once: `mode` is use_reentrant, `between` what runs between two of them."""

    mode = False
    between = staticmethod(lambda x: x)

    def __iter__(self):
        blocks = list(self._modules.values())

        def run(names, x, *values):
            for block in blocks:
                x = self.between(block(x, **dict(zip(names, values, strict=True))))
            return x

        return iter([lambda x, **kwargs: checkpoint(run, list(kwargs), x, *kwargs.values(), use_reentrant=self.mode)])


def grouped(model, calls, mode, between=lambda x: x):
    blocks, kind = model.transformer_blocks, type(model.transformer_blocks)
    blocks.__class__ = type("Grouped", (Grouped,), {"mode": mode, "between": staticmethod(between)})
    try:
        return gradients(model, calls)
    finally:
        blocks.__class__ = kind


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "method", "arguments"),
    [
        ("pixart", "at_edm", {"keep": 0.4, "steps": {}}),
        ("dit", "tomesd", {"keep": 0.6, "merge_mlp": True}),
        ("dit", "toma", {"schedule": {0: 0.6}}),
        ("dit", "random", {"keep": 0.6}),
        ("dit", "random", {"keep": 1.0}),
    ],
)
def test_a_group_of_blocks_checkpointed_at_once(name, method, arguments, reentrant):
    model, inputs = build(name)
    calls = [inputs(1, 16, 16), inputs(2, 8, 8)]
    plain = gradients(model, calls)
    tokenprune.patch(model, method, **arguments)
    expected = gradients(model, calls)
    assert torch.equal(expected[0], plain[0]) == (arguments.get("keep") == 1.0)
    for one, other in zip(grouped(model, calls, reentrant), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_group_whose_blocks_are_not_known_again_is_refused(reentrant):
    model, inputs = build("dit")
    tokenprune.patch(model, "random", keep=0.6)
    calls = [inputs(1, 16, 16)]
    gradients(model, calls)
    with pytest.raises(tokenprune.UnsupportedModel, match="checkpoint each block by itself"):
        grouped(model, calls, reentrant, between=lambda x: x + 1.0)
