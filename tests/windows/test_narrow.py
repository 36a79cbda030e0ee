"""Methods for tokens on models of windows: the MLPs run on what they leave of each window."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from typing import Any

import naive_adaptive
import naive_clusters
import naive_methods
import naive_narrow
import pytest
import timm
import torch
import zoo
from families import full_but, states_in_memory
from naive_vit import Reduce
from test_unpatch import assert_same, everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from windows_zoo import build, hiera, images

import tokenprune
from tokenprune.narrow.site import here

torch.set_num_threads(1)
NAMES = ("v1", "v2", "hiera")
SIZE = {"v1": (36, 24), "v2": (36, 24), "hiera": (32, 48)}
# The table of Swin v2's coordinates is in float32, whatever the model is in.
TOLERANCE = {"v1": 1e-7, "v2": 1e-6, "hiera": 1e-7}
REDUCE: dict[str, Reduce] = {
    "top_k": naive_methods.top_k,
    "evit": naive_methods.evit,
    "tome": naive_methods.tome,
    "k_medoids": naive_clusters.k_medoids,
    "dpc_knn": naive_clusters.dpc_knn,
    "saint": naive_adaptive.saint,
}


FAST = (("v1", "top_k"), ("v1", "saint"), ("v2", "top_k"), ("hiera", "tome"), ("hiera", "evit"))


def pairs(methods: Iterable[str]) -> list[Any]:
    """Each model with each method, of which FAST are in the fast tests."""
    every = [(name, method) for name in NAMES for method in methods]
    return [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.full) for pair in every]


def model_of(name: str) -> nn.Module:
    return hiera() if name == "hiera" else build(name).double()


def inputs(name: str, batch: int = 2) -> Tensor:
    return images(SIZE[name], batch).double()


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.split(".")[-2:-1] == ["blocks"]}


def everywhere(model: nn.Module, share: float = 0.5) -> dict[str, dict[int | str, float]]:
    """A schedule of all blocks that do not pool: they run even where choosing costs what it saves."""
    chosen = {name: share for name, module in blocks(model).items() if getattr(module.attn, "q_stride", 1) == 1}
    return {"schedule": chosen}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x)
    return output


@pytest.mark.parametrize(("name", "method"), pairs(REDUCE))
def test_against_loops(name: str, method: str) -> None:
    model, x = model_of(name), inputs(name)
    plain = run(model, x)
    oracle = naive_narrow.run_hiera if name == "hiera" else naive_narrow.run_swin
    expected, counts = oracle(model, x, REDUCE[method], 0.5)
    tokenprune.patch(model, method, **everywhere(model))
    with tokenprune.record(model) as recording:
        got = run(model, x)
    assert (got - plain).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[name], atol=TOLERANCE[name])
    (forward,) = recording.forwards
    assert {place.name: int((place.kept >= 0).sum()) for place in forward.places} == counts
    told = {place["name"]: place["tokens_out"] for place in tokenprune.report(model).to_dict()["places"]}
    assert told == {block: round(count / len(x)) for block, count in counts.items()}


@pytest.mark.parametrize(("name", "method"), pairs(["top_k", "tome", "evit", "saint", "adaptive_tome"]))
def test_a_recording_tells_where_tokens_of_the_image_went(name: str, method: str) -> None:
    """A token that one stands for gains what that one gains, the others nothing."""
    model, x = model_of(name), inputs(name)
    tokenprune.patch(model, method, **everywhere(model))
    gained: dict[str, Tensor] = {}
    for block, module in blocks(model).items():
        last = module.norm2 if name == "v2" else module.mlp
        last.register_forward_hook(lambda m, args, out, block=block: gained.update({block: out.clone()}))
    with tokenprune.record(model) as recording:
        run(model, x)
    assert recording.forwards[0].places
    for place in recording.forwards[0].places:
        gain = gained[place.name]
        if name == "hiera":
            gain = model.reroll(gain, int(place.name.split(".")[1])).flatten(1, 2)
        assert place.grid[0] * place.grid[1] == gain.shape[1] == place.source.shape[1]
        for image in range(len(x)):
            source, kept = place.source[image], place.kept[image]
            assert (gain[image][source < 0] == 0).all()
            stands = kept[source.clamp(min=0)]
            assert torch.equal(gain[image][source >= 0], gain[image][stands][source >= 0])
            assert source.max() + 1 == (kept >= 0).sum()
            if method != "evit":  # a fused token is none of those that went into it
                assert torch.equal(source[kept[kept >= 0]], torch.arange(int((kept >= 0).sum())))
        if place.sizes is not None:
            represented = torch.stack([(row >= 0).sum() for row in place.source])
            assert torch.equal(place.sizes.sum(1).long(), represented)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all(name: str) -> None:
    model, x = model_of(name), inputs(name)
    plain, before = run(model, x), list(everything(model))
    for budget in ({"keep": 1.0}, {"flops": 1.0}):
        tokenprune.patch(model, "top_k", **budget)
        assert torch.equal(run(model, x), plain)
        assert tokenprune.report(model).to_dict()["flops_ratio"] == 1.0
    for method in ("top_k", "tome", "adaptive_tome"):
        options = {"threshold": 1.0} if method == "adaptive_tome" else {}
        tokenprune.patch(model, method, **everywhere(model, 1.0), **options)
        torch.testing.assert_close(run(model, x), plain, rtol=1e-9, atol=1e-9)
    states = states_in_memory()
    tokenprune.unpatch(model)
    assert_same(before, model)
    assert torch.equal(run(model, x), plain)
    assert here().running is None
    assert states_in_memory() == states


@pytest.mark.parametrize("name", NAMES)
def test_budgets(name: str) -> None:
    model, x = model_of(name), inputs(name)
    before = zoo.count(model, x[:1]).get_total_flops() // 2
    for budget in ({"keep": 0.5}, {"flops": 0.95}, {"flops": 0.92}):
        data = tokenprune.report(tokenprune.patch(model, "tome", **budget)).to_dict()
        assert data["flops_before"] == before
        assert data["flops_after"] == zoo.count(model, x[:1]).get_total_flops() // 2
        if "flops" in budget:
            assert data["flops_ratio"] == pytest.approx(budget["flops"], abs=0.01)
        else:
            assert all(place["tokens_out"] == place["tokens_in"] // 2 for place in data["places"])
    tokenprune.patch(model, "saint", keep=0.5)
    run(model, x[:1])
    data = tokenprune.report(model).to_dict()
    assert data["flops_after"] == zoo.count(model, x[:1]).get_total_flops() // 2


@pytest.mark.parametrize(("name", "method"), pairs(["top_k", "tome", "saint"]))
def test_promises(name: str, method: str) -> None:
    model, x = model_of(name), inputs(name, 3)
    tokenprune.patch(model, method, **everywhere(model))
    out = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), out)
        assert tokenprune.report(twin).to_dict() == tokenprune.report(model).to_dict()
    torch.testing.assert_close(torch.cat([run(model, one[None]) for one in x]), out, rtol=1e-9, atol=1e-9)
    broken = x.clone()
    broken[1, 0, 5, 5] = float("nan")
    with_nan = run(model, broken)
    assert with_nan[1].isnan().all()
    torch.testing.assert_close(with_nan[[0, 2]], out[[0, 2]], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), out)
    model(x.requires_grad_()).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for reentrant in (False, True):
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        model.set_grad_checkpointing(reentrant)
        for one, p in zip(expected, (p for p in model.parameters() if p.grad is not None), strict=True):
            torch.testing.assert_close(p.grad, one)


def test_hooks_of_the_user() -> None:
    model, other, x = build(), build("v2"), images()
    tokenprune.patch(model, "top_k", keep=0.5)
    tokenprune.patch(other, "tome", keep=0.6)
    expected, seen = run(model, x), []

    def look(*_: Any) -> None:
        run(other, x)

    for module in (model.patch_embed, model.layers[0], model.layers[0].blocks[0].norm2, model.layers[1].blocks[1].mlp):
        hook = module.register_forward_hook(look)
        with tokenprune.record(model) as recording:
            assert torch.equal(run(model, x), expected)
        assert [len(forward.places) for forward in recording.forwards] == [6]
        hook.remove()
    model.layers[0].blocks[0].mlp.fc1.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    run(model, x)
    assert seen == [108]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.layers[1].blocks[1].mlp.fc1.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model.forward_features(x)
    hook.remove()
    assert here().running is None
    assert torch.equal(run(model, x), expected)


def test_windows_with_padding_are_left_alone() -> None:
    model = build("v1", (36, 28))
    data = tokenprune.report(tokenprune.patch(model, "tome", keep=0.5)).to_dict()
    assert {place["name"] for place in data["places"]} == {f"layers.0.blocks.{b}" for b in range(2)}
    assert all("padding" in data["skipped"][f"layers.1.blocks.{b}"] for b in range(4))
    assert run(model, images((36, 28))).isfinite().all()
    with pytest.raises(tokenprune.UnsupportedModel, match="padding"):
        tokenprune.patch(build("v1", (38, 22)), "tome", keep=0.5)


def test_refused() -> None:
    model = build()
    cases: list[tuple[type[Exception], str, str, dict[str, Any]]] = [
        (tokenprune.BudgetError, "keep=0.5\\) works", "tome", {"r": 4}),
        (tokenprune.BudgetError, "keep=0.5\\) works", "top_k", {"rate": 0.5}),
        (tokenprune.BudgetError, "all are there again", "top_k", {"tokens": 8}),
        (tokenprune.BudgetError, "use schedule=", "top_k", {"places": (1,), "keep": 0.5}),
        (tokenprune.BudgetError, "must leave 3", "tome", {"keep": 0.2}),
        (tokenprune.BudgetError, "leaves no token out", "top_k", {"keep": 0.99}),
        (tokenprune.BudgetError, "leaves attention as it is", "top_k", {"flops": 0.2}),
        (tokenprune.BudgetError, "in each window", "saint", {"flops": 0.5}),
        (tokenprune.UnsupportedMethod, "blocks of windows do not expose", "zero_tprune", {"feature": "x_pre"}),
        (tokenprune.UnsupportedMethod, "denoising", "tome", {"keep": 0.5, "steps": "constant"}),
    ]
    for error, message, method, budget in cases:
        with pytest.raises(error, match=message):
            tokenprune.patch(model, method, **budget)
    tokenprune.patch(model, "top_k", keep=0.5)
    model.set_input_size(img_size=(36, 24), window_size=(2, 2))
    with pytest.raises(tokenprune.UnsupportedModel, match="patch the model again"):
        run(model, images())


@pytest.mark.parametrize("name", full_but(("v1",), NAMES))
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    model = build(depths=(2, 1)) if name == "v1" else model_of(name)
    x = inputs(name).to(next(model.parameters()).dtype)
    for method in ("top_k", "tome") if name != "v1" else ("evit",):
        tokenprune.patch(model, method, **everywhere(model))
        expected = run(model, x)
        torch.testing.assert_close(run(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)
        torch.testing.assert_close(run(torch.export.export(model, (x,)).module(), x), expected)


def test_real_sizes() -> None:
    """Built without values, and patched: costs are those of torch."""
    for name in ("swin_tiny_patch4_window7_224", "hiera_tiny_224"):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        x = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
        data = tokenprune.report(tokenprune.patch(model, "top_k", flops=0.75)).to_dict()
        assert data["flops_ratio"] == pytest.approx(0.75, abs=0.01)
        assert data["flops_after"] == zoo.count(model, x).get_total_flops() // 2


def test_a_forward_in_which_nothing_could_go_is_told() -> None:
    """Of 6 tokens in a window 3 stand against 3, and no token has the 5 near neighbours that it takes."""
    model, x = model_of("v1"), inputs("v1")
    plain = run(model, x)
    for options, gone in (({}, False), ({"neighbours": 1, "threshold": -0.99}, True), ({"keep": 0.5}, True)):
        tokenprune.patch(model, "saint", **options)
        assert "no token went" not in str(tokenprune.report(model))
        assert torch.allclose(run(model, x), plain) is not gone
        told = [note for note in tokenprune.report(model).to_dict()["notes"] if "no token went" in note]
        assert len(told) == (not gone)


@pytest.mark.parametrize("entry", ["forward", "forward_features"])
def test_the_models_own_forward_in_its_own_hook_is_recorded_apart(entry: str) -> None:
    model, x = model_of("v1"), inputs("v1")
    y = inputs("v1", 1)
    tokenprune.patch(model, "top_k", **everywhere(model))
    blocks = model.layers[0].blocks[1], model.layers[1].blocks[2]
    for register in (model.layers[0].register_forward_hook, *(block.register_forward_pre_hook for block in blocks)):
        seen: list[Tensor] = []

        def look(*_: object, seen: list[Tensor] = seen) -> None:
            if not seen:
                seen.append(y)
                run(model, y)

        with tokenprune.record(model) as recording, torch.no_grad():
            expected = getattr(model, entry)(x)
            hook = register(look)
            got = getattr(model, entry)(x)
            hook.remove()
        alone, outer, inner = recording.forwards
        assert torch.equal(got, expected)
        assert [place.name for place in outer.places] == [place.name for place in alone.places]
        assert all(torch.equal(a.kept, b.kept) for a, b in zip(outer.places, alone.places, strict=True))
        assert [place.kept.shape[0] for place in inner.places] == [1] * len(alone.places)
        assert here().running is None
        assert here().depth == 0
