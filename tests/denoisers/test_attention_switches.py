"""What hosts change in the attention of a patched denoiser: fused projections, backends, processors."""

import types

import pytest
import torch
from denoisers_zoo import build, nothing_is_left, run
from diffusers.models import attention_dispatch, attention_processor
from torch.nn.functional import scaled_dot_product_attention

import tokenprune

torch.set_num_threads(1)
EDM, MASK = {"method": "at_edm", "keep": 0.4, "steps": {}}, torch.eye(8, 6).bool()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def check_in_either_order(name, arguments, switch_on, switch_off):
    """With the switch on, a patched model gives what it gave without, in either order, and is unpatched exactly."""
    model, inputs = build(name)

    def output():
        return run(model, inputs(2, 16, 12))  # other latents are another run: tokens are chosen anew

    plain = output()
    tokenprune.patch(model, **arguments)
    patched = output()
    assert not torch.allclose(patched, plain, rtol=1e-2)
    found = []
    for order in ("patch", "switch"):
        switch_on(model)
        if order == "switch":
            switched = output()
            tokenprune.patch(model, **arguments)
        found.append(output())
        if order == "patch":
            switch_off(model)
            assert torch.equal(output(), patched)
        tokenprune.unpatch(model)
        if order == "switch":
            assert torch.equal(output(), switched)
            switch_off(model)
        assert torch.equal(output(), plain)
    assert torch.equal(*found)
    close(found[0], patched)
    assert nothing_is_left(model)


def fuse(model):
    model.fuse_qkv_projections()


def unfuse(model):
    model.unfuse_qkv_projections()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("flux", "at_edm"),
        *(
            pytest.param(name, method, marks=pytest.mark.full)
            for name, method in (
                ("pixart", "random"),
                ("flux", "random"),
                ("sd3", "random"),
                ("pixart", "tomesd"),
                ("unet_sd", "at_edm"),
                ("unet_sdxl", "random"),
            )
        ),
    ],
)
def test_fused_projections(name, method):
    # at_edm projects queries and keys itself one block deep (unet_sd); behind a norm (FLUX) they come out on their own.
    arguments = {"method": method, "keep": 0.5, "steps": {}}
    check_in_either_order(name, arguments, fuse, unfuse)


@pytest.mark.parametrize("order", ["patch", "fuse"])
@pytest.mark.parametrize(
    ("name", "cross"),
    [
        ("pixart", False),
        pytest.param("pixart", True, marks=pytest.mark.full),
        pytest.param("unet_sdxl", False, marks=pytest.mark.full),
    ],
)
def test_at_edm_refuses_fused_projections_and_works_again_without(name, cross, order):
    model, inputs = build(name)
    arguments = {**EDM, "attention": "cross"} if cross else EDM
    tokenprune.patch(model, **arguments)
    patched = run(model, inputs(1, 16, 12))
    if order == "fuse":
        tokenprune.unpatch(model)
    fuse(model)
    with pytest.raises(tokenprune.UnsupportedMethod, match="unfuse them"):
        tokenprune.patch(model, **arguments) if order == "fuse" else run(model, inputs(1, 16, 12))
    unfuse(model)
    if order == "fuse":
        tokenprune.patch(model, **arguments)
    assert torch.equal(run(model, inputs(1, 16, 12)), patched)


@pytest.mark.parametrize(
    ("name", "method", "backend"),
    [
        ("flux", "at_edm", "_native_math"),
        pytest.param("flux", "region", "_native_math", marks=pytest.mark.full),
        pytest.param("wan", "random", "_native_math", marks=pytest.mark.full),
        pytest.param("qwenimage", "at_edm", "_native_math", marks=pytest.mark.full),
        ("flux", "random", "flex"),
    ],
)
def test_attention_backends(name, method, backend, monkeypatch):
    used = []
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    key = attention_dispatch.AttentionBackendName(backend)
    original = registry._backends[key]
    monkeypatch.setitem(
        registry._backends, key, lambda *args, **kwargs: used.append(kwargs["query"].shape) or original(*args, **kwargs)
    )
    arguments = {"mask": MASK} if method == "region" else {"keep": 0.4, "steps": {}}
    switches = (lambda model: model.set_attention_backend(backend), lambda model: model.set_attention_backend("native"))
    if method == "region":
        model, inputs = build(name)
        steps = [{**inputs(1, 16, 12), "timestep": torch.full((1,), t)} for t in (0.9, 0.5)]
        tokenprune.patch(model, method, **arguments)
        patched = [run(model, x) for x in steps]
        switches[0](model)
        for x, expected in zip(steps, patched, strict=True):
            close(run(model, x), expected)
        switches[1](model)
    else:
        check_in_either_order(name, {"method": method, **arguments}, *switches)
    assert len({shape[1] for shape in used}) > 1  # of all tokens, and of fewer


def xformers_stand_in(query, key, value, attn_bias=None, op=None, scale=None, p=0.0):
    """[B H, N, D], or [B, N, H, D]."""
    swap = query.ndim == 4
    query, key, value = (x.transpose(1, 2) if swap else x for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)
    return out.transpose(1, 2) if swap else out


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pixart", EDM),
        pytest.param("unet_sdxl", EDM, marks=pytest.mark.full),
        pytest.param("unet_sd", {"method": "tomesd", "keep": 0.5}, marks=pytest.mark.full),
        pytest.param("unet_sdxl", {"method": "todo", "keep": 0.5}, marks=pytest.mark.full),
        pytest.param("sd3", EDM, marks=pytest.mark.full),
    ],
)
def test_xformers_attention(name, arguments, monkeypatch):
    # Its operators run on a GPU alone: the call is the host's, the operator a stand-in.
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    operators = types.SimpleNamespace(memory_efficient_attention=xformers_stand_in)
    monkeypatch.setattr(attention_processor, "xformers", types.SimpleNamespace(ops=operators), raising=False)
    on_a_gpu = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, device=None, **kwargs: on_a_gpu(*args, **kwargs))
    processors = {}

    def switch_on(model):
        processors.update(model.attn_processors)
        model.enable_xformers_memory_efficient_attention()
        assert all("XFormers" in type(one).__name__ for one in model.attn_processors.values())

    check_in_either_order(name, arguments, switch_on, lambda model: model.set_attn_processor(dict(processors)))


def test_the_hosts_own_refusal_of_xformers_leaves_the_patch():
    model, inputs = build("pixart")
    tokenprune.patch(model, **EDM)
    patched = run(model, inputs(1, 16, 12))
    if attention_processor.is_xformers_available() and torch.cuda.is_available():
        model.enable_xformers_memory_efficient_attention()
        model.disable_xformers_memory_efficient_attention()
    else:
        with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
            model.enable_xformers_memory_efficient_attention()
    assert torch.equal(run(model, inputs(1, 16, 12)), patched)
