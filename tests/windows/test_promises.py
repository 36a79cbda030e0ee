"""What every patch promises, on models of windows."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import timm
import torch
import zoo
from families import states_in_memory
from test_unpatch import assert_same, everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from windows_zoo import SIZES, build, images

import tokenprune
from tokenprune.evals.viz import place_panels
from tokenprune.windows.here import here

torch.set_num_threads(1)
NAMES = ("v1", "v2")
EVERYWHERE = dict.fromkeys(range(6), 1.0)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x)
    return output


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Of a backward behind the forwards of all inputs."""
    model.zero_grad()
    outputs = [model(x) for x in inputs]
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture(autouse=True)
def _nothing_runs() -> None:
    """An entry point without an end, such as patch_embed alone, leaves its pass until the next forward."""
    here().now = here().site = None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_keeping_all(name: str, size: tuple[int, int]) -> None:
    model, x = build(name, size), images(size)
    plain = run(model, x)
    for budget in ({"keep": 1.0}, {"flops": 1.0}, {"ratios": (0.0, 0.0)}):
        tokenprune.patch(model, "sparsevit", **budget)
        assert torch.equal(run(model, x), plain)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == 1.0
    tokenprune.patch(model, "sparsevit", schedule=EVERYWHERE)  # gathers, computes and puts back every window
    with tokenprune.record(model) as recording:
        out = run(model, x)
    assert len(recording.forwards[0].places) == 6
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(model.double(), x.double()), run(tokenprune.unpatch(model), x.double()))


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_leaves_nothing(name: str) -> None:
    model, x = build(name), images()
    plain, before, states = run(model, x), list(everything(model)), states_in_memory()
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    tokenprune.patch(model, "sparsevit", flops=0.7)
    assert not torch.equal(run(model, x), plain)
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    gradients(model, x)
    model.zero_grad()
    tokenprune.unpatch(model)
    assert_same(before, model)
    assert torch.equal(run(model, x), plain)
    assert here().now is None
    assert here().site is None
    assert states_in_memory() == states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flops", [0.8, 0.5])
def test_a_flops_budget_is_met_as_torch_counts_it(name: str, flops: float) -> None:
    model = build(name, dynamic_img_size=True)
    bare = {size: zoo.count(model, images(size, 1)).get_total_flops() // 2 for size in (*SIZES, (42, 34))}
    tokenprune.patch(model, "sparsevit", flops=flops)
    for size, before in bare.items():
        counted = zoo.count(model, images(size, 1)).get_total_flops() // 2
        data = tokenprune.report(model).to_dict()
        assert data["flops_before"] == before
        assert data["flops_after"] == counted
        assert counted / before == pytest.approx(flops, abs=0.01)


def test_a_budget_counts_windows() -> None:
    model = build()
    data = tokenprune.report(tokenprune.patch(model, "sparsevit", keep=0.4)).to_dict()
    assert [(place["windows_in"], place["windows_out"]) for place in data["places"]] == [(36, 15)] * 2 + [(9, 4)] * 4
    assert (data["places"][0]["tokens_in"], data["places"][0]["tokens_out"]) == (216, 90)
    for ratios in ((0.6, 0.3), [0.6, 0.3, 0.3]):
        data = tokenprune.report(tokenprune.patch(model, "sparsevit", ratios=ratios)).to_dict()
        assert [place["windows_out"] for place in data["places"]] == [14] * 2 + [6] * 4
    data = tokenprune.report(tokenprune.patch(model, "sparsevit", schedule={"layers.1.blocks.0": 0.5, -1: 0.2, 0: 1.0}))
    data = data.to_dict()
    assert [(p["name"], p["windows_out"]) for p in data["places"]] == [
        ("layers.0.blocks.0", 36),
        ("layers.1.blocks.0", 5),
        ("layers.1.blocks.3", 2),
    ]
    assert "does not name it" in data["skipped"]["layers.1.blocks.1"]


def test_the_published_ratios() -> None:
    model = build(size=(96, 96), depths=(2, 2, 6, 2), num_heads=(1, 1, 2, 2), window_size=3)
    data = tokenprune.report(tokenprune.patch(model, "sparsevit")).to_dict()
    shares = {place["name"]: (place["windows_in"], place["windows_out"]) for place in data["places"]}
    assert shares == {
        **{f"layers.0.blocks.{b}": (256, 102) for b in range(2)},
        **{f"layers.2.blocks.{b}": (16, (12, 12, 9, 9, 8, 8)[b]) for b in range(6)},
    }
    assert set(data["skipped"]) == {f"layers.{s}.blocks.{b}" for s in (1, 3) for b in range(2)}
    deep = build(size=(96, 96), depths=(2, 2, 18, 2), num_heads=(1, 1, 2, 2), window_size=3)
    data = tokenprune.report(tokenprune.patch(deep, "sparsevit")).to_dict()
    assert [place["windows_out"] for place in data["places"][2:]] == [12] * 6 + [9] * 6 + [8] * 6


@pytest.mark.parametrize("name", NAMES)
def test_dense_outputs_by_every_entry(name: str) -> None:
    model, x = build(name).double(), images().double()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    out = run(model, x)
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(model.forward_head(features), out)
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 18, 12), (16, 9, 6)]
    torch.testing.assert_close(final, features)
    with torch.no_grad():
        torch.testing.assert_close(model.norm(maps[-1].permute(0, 2, 3, 1)), features)


def test_feature_maps() -> None:
    """Of a Swin timm takes the stages out of the model, where it is asked for feature maps alone."""
    arguments = {"img_size": SIZES[1], "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), window_size=3, **arguments
    ).eval()
    zoo.randomise(model, 0)
    x = images(SIZES[1])
    with torch.no_grad():
        plain = model(x)
        tokenprune.patch(model, "sparsevit", ratios=(0.6, 0.5))
        got = model(x)
        assert [place["name"] for place in tokenprune.report(model).to_dict()["places"]] == [
            f"layers_{s}.blocks.{b}" for s in range(2) for b in range(2)
        ]
        assert [one.shape for one in got] == [one.shape for one in plain]
        assert not torch.equal(got[0], plain[0])
        tokenprune.unpatch(model)
        assert all(torch.equal(one, other) for one, other in zip(model(x), plain, strict=True))


def test_copies_and_pickles() -> None:
    model, x = build(), images()
    tokenprune.patch(model, "sparsevit", ratios=(0.6, 0.3, 0.5))
    gradients(model, x)
    out = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), out)
        assert tokenprune.report(twin).to_dict() == tokenprune.report(model).to_dict()
        with torch.no_grad():
            for parameter in twin.layers.parameters():
                parameter.mul_(1.1)
        assert torch.equal(run(model, x), out)
        tokenprune.unpatch(twin)
        assert type(twin.layers[0].blocks[0]).__qualname__ == "SwinTransformerBlock"
    assert torch.equal(run(model, x), out)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing(name: str, reentrant: bool) -> None:
    """Two forwards of different sizes, and then one backward."""
    model = build(name, dynamic_img_size=True).double()
    inputs = [images(size).double().requires_grad_() for size in SIZES]
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = gradients(model, *inputs)
    seen = []
    model.layers[0].blocks[0].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    model.set_grad_checkpointing()
    earlier = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        got = gradients(model, *inputs)
    finally:
        timm.layers.set_reentrant_ckpt(earlier)
    assert seen == [108, 126, 126, 108]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_more_than_a_block(reentrant: bool) -> None:
    model, x = build().double(), images().double().requires_grad_()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = gradients(model, x)
    with tokenprune.record(model) as recording:
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert len(recording.forwards) == 1
    for one, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-9, atol=1e-9)
    tokenprune.patch(build("v2"), "sparsevit", keep=0.5).patch_embed(images())  # a pass of another that never ends
    hidden = model.patch_embed(x)
    for stage in model.layers:
        hidden = checkpoint(stage, hidden, use_reentrant=reentrant)
    with pytest.raises(tokenprune.UnsupportedModel, match="checkpoint each block by itself"):
        model.forward_head(model.norm(hidden)).sum().backward()


def test_another_model_in_a_hook_leaves_the_forward_as_it_is() -> None:
    model, other, x = build(), build("v2"), images()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    tokenprune.patch(other, "sparsevit", keep=0.3)
    expected = run(model, x)

    def look(seen: nn.Module) -> None:
        run(seen, x)

    for module in (model.layers[0], model.layers[0].blocks[0].mlp):
        hook = module.register_forward_hook(lambda *_: look(other))
        assert torch.equal(run(model, x), expected)
        hook.remove()
    assert here().now is None


@pytest.mark.parametrize("entry", ["forward", "forward_features"])
def test_the_models_own_forward_in_its_own_hook_leaves_the_outer_one_as_it_is(entry: str) -> None:
    model, x, y = build(), images(), images(seed=1)
    tokenprune.patch(model, "sparsevit", keep=0.5)
    with torch.no_grad():
        expected, inner = getattr(model, entry)(x), run(model, y)
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        if not seen:
            seen.append(torch.empty(0))
            seen.append(run(model, y))

    registers = [m.register_forward_hook for m in (model.layers[0], model.layers[0].blocks[0].mlp)]
    registers += [model.layers[1].blocks[2].attn.register_forward_hook]
    registers += [m.register_forward_pre_hook for m in (model.layers[0].blocks[1], model.layers[1].blocks[3])]
    for register in registers:
        seen.clear()
        hook = register(look)
        with torch.no_grad():
            assert torch.equal(getattr(model, entry)(x), expected)
        hook.remove()
        assert torch.equal(seen[1], inner)
        assert here().now is None
        assert here().site is None
        assert here().depth == 0


def test_stochastic_depth_drops_images_as_the_host_does() -> None:
    model, x = build(drop_path_rate=0.5).double().train(), images(batch=8).double()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(run(model, x))
        tokenprune.patch(model, "sparsevit", schedule=EVERYWHERE)
    torch.testing.assert_close(*outputs)


def test_number_formats() -> None:
    model, x = build(), images()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(model, x).float(), expected, rtol=0.1, atol=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        out = run(half, x.to(dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()


def test_nan_stays_in_its_image() -> None:
    model, x = build(), images(batch=3)
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = run(model, x)
    x[1, 0, 5, 5] = float("nan")
    out = run(model, x)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]])


def test_usable_after_an_exception() -> None:
    model, x = build(), images()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = run(model, x)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.layers[1].blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.forward_features(x)
    hook.remove()
    assert torch.equal(run(model, x), expected)


def test_threads_share_a_model() -> None:
    model, inputs = build(dynamic_img_size=True), [images(size, seed=i) for i, size in enumerate((*SIZES, *SIZES))]
    tokenprune.patch(model, "sparsevit", ratios=(0.6, 0.3, 0.5))
    expected, got = [run(model, x) for x in inputs], [torch.empty(0)] * 4

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = run(model, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["v1", pytest.param("v2", marks=pytest.mark.full)])
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    model, x = build(name, SIZES[1], depths=(2, 1)), images(SIZES[1])
    tokenprune.patch(model, "sparsevit", ratios=(0.6, 0.5))
    expected = run(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(torch.export.export(model, (x,)).module(), x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_no_more_graphs_than_the_host() -> None:
    counts = []
    for patched in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        model = build()
        if patched:
            tokenprune.patch(model, "sparsevit", flops=0.6)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for batch in (2, 2, 3, 5, 4):
            run(compiled, images(batch=batch))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


def test_a_users_hook_sees_the_full_grid_once() -> None:
    model, seen = build(), []
    model.layers[0].blocks[0].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    tokenprune.patch(model, "sparsevit", keep=0.5)
    model.layers[0].blocks[1].register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    run(model, images())
    assert seen == [(2, 18, 12, 8)] * 2


def test_what_is_refused() -> None:
    model, patch = build(), tokenprune.patch
    vit = torch.nn.Sequential(zoo.create("vit_tiny_patch16_224"))
    cases: list[tuple[type[Exception], str, nn.Module, str, dict[str, Any]]] = [
        (tokenprune.BudgetError, "all tokens are there again", model, "sparsevit", {"tokens": 8}),
        (tokenprune.BudgetError, "flops=0.1 cannot be met", model, "sparsevit", {"flops": 0.1}),
        (tokenprune.BudgetError, "2 stages and 3 pairs", model, "sparsevit", {"ratios": (0.5,)}),
        (tokenprune.BudgetError, "in \\[0, 1\\)", model, "sparsevit", {"ratios": (0.5, 1.0)}),
        (tokenprune.BudgetError, "row of shares", model, "sparsevit", {"ratios": 0.5}),
        (tokenprune.BudgetError, "this one has 2; use", model, "sparsevit", {}),
        (tokenprune.BudgetError, "one budget", model, "sparsevit", {"ratios": (0.5, 0.5), "keep": 0.5}),
        (tokenprune.BudgetError, "leaves no window out", model, "sparsevit", {"keep": 0.99}),
        (tokenprune.BudgetError, "the place '6'", model, "sparsevit", {"schedule": {6: 0.5}}),
        (tokenprune.BudgetError, "twice", model, "sparsevit", {"schedule": {0: 0.5, "layers.0.blocks.0": 0.5}}),
        (tokenprune.BudgetError, "use schedule=", model, "random", {"rate": 0.5, "places": (1,)}),
        (tokenprune.UnsupportedMethod, "denoising", model, "sparsevit", {"keep": 0.5, "steps": "constant"}),
        (tokenprune.UnsupportedMethod, "needs windows", vit, "sparsevit", {"keep": 0.5}),
    ]
    for error, message, target, method, budget in cases:
        with pytest.raises(error, match=message):
            patch(target, method, **budget)
    plain = run(model, images())
    model.set_input_size(img_size=(48, 24))
    patch(model, "sparsevit", keep=0.5)
    model.set_input_size(img_size=(36, 24), window_size=(2, 2))
    with pytest.raises(tokenprune.UnsupportedModel, match="patch the model again"):
        run(model, images())
    tokenprune.unpatch(model)
    model.layers[0].blocks[0].forward = model.layers[0].blocks[0].forward
    with pytest.raises(tokenprune.UnsupportedModel, match="replaced on the instance"):
        patch(model, "sparsevit", keep=0.5)
    assert plain.shape == (2, 7)


def test_the_default_of_a_swin() -> None:
    model = build()
    assert tokenprune.report(tokenprune.patch(model, keep=0.5)).to_dict()["method"] == "sparsevit"


def test_fused_attention_gives_the_same() -> None:
    """timm's Swin runs one where TIMM_FUSED_ATTN=2 asks for it."""
    model, x = build(size=SIZES[1]).double(), images(SIZES[1]).double()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = run(model, x)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = True
    torch.testing.assert_close(run(model, x), expected, rtol=1e-9, atol=1e-9)


def test_pictures_of_the_windows() -> None:
    model, x = build(), images(batch=1)
    tokenprune.patch(model, "sparsevit", keep=0.5)
    panels = place_panels(model, x, torch.rand(3, 36, 24), "picture")
    assert [caption for caption, _ in panels][1:] == [
        *(f"layers.0.blocks.{b}: 216 -> 108" for b in range(2)),
        *(f"layers.1.blocks.{b}: 54 -> 30" for b in range(4)),
    ]
    assert all(image.shape[0] % rows == 0 for (_, image), rows in zip(panels, [18] * 3 + [9] * 4, strict=True))
