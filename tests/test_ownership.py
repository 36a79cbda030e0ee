"""Promise 2: a patched model is still the user's module: its parameters, copies, pickles, hooks, wrappers."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from families import FAMILIES, FEW, FIRST_METHODS, METHODS, build, full_but, images, options, patches, run
from torch import Tensor, nn
from torch.nn import functional as F

import tokenprune


def patched(family: str, method: str = "tome", **budget: Any) -> nn.Module:
    return tokenprune.patch(build(family), method, **(budget or {"keep": 0.5}), **options(family, method))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_state_dict(family: str) -> None:
    model = build(family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    names, modules = list(dict(model.named_parameters())), list(dict(model.named_modules()))
    tokenprune.patch(model, "tome", keep=0.6, **options(family, "tome"))
    run(model, images(model))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert list(dict(model.named_parameters())) == names
    assert list(dict(model.named_modules())) == modules
    model.load_state_dict(state)


def test_load_state_dict_takes_effect() -> None:
    model, twin = patched("class_token"), patched("class_token")
    x = images(model)
    state = {key: value * 1.1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.equal(run(model, x), run(twin, x))
    twin.load_state_dict(state, assign=True)
    assert torch.equal(run(model, x), run(twin, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_owns_its_weights(family: str) -> None:
    model = patched(family)
    x = images(model)
    reduced = run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), reduced)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.mul_(1.2)
    assert torch.equal(run(model, x), reduced)
    assert not torch.equal(run(twin, x), reduced)
    state = {key: value.clone() for key, value in twin.state_dict().items()}
    fresh = build(family)
    fresh.load_state_dict(state)
    tokenprune.patch(fresh, "tome", keep=0.5, **options(family, "tome"))
    assert torch.equal(run(twin, x), run(fresh, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_pickle(family: str) -> None:
    model = patched(family, "zero_tprune")
    x = images(model)
    reduced = run(model, x)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(loaded, x), reduced)
    assert tokenprune.report(loaded).to_dict() == tokenprune.report(model).to_dict()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    tokenprune.unpatch(model)
    assert torch.equal(run(tokenprune.unpatch(torch.load(buffer, weights_only=False)), x), run(model, x))


@pytest.mark.parametrize("method", full_but((*FIRST_METHODS, "diffrate", "pomt"), METHODS))
def test_pickle_and_deepcopy_of_every_method(method: str) -> None:
    model = patched("class_token", method)
    x = images(model)
    reduced = run(model, x)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), x), reduced)
    assert torch.equal(run(copy.deepcopy(model), x), reduced)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_eval_and_to(family: str) -> None:
    model = patched(family)
    x = images(model)
    reduced = run(model, x)
    assert model.train().blocks[0].training
    assert not model.eval().blocks[0].training
    assert torch.equal(run(model, x), reduced)
    double = run(model.double(), x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), reduced, rtol=1e-3, atol=1e-3)
    assert run(model.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    model.requires_grad_(False)
    assert not model(x.bfloat16()).requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_the_user_fire_once_and_see_the_reduced_tokens(family: str) -> None:
    model = build(family)
    x = images(model)
    seen: list[tuple[str, int]] = []

    def note(kind: str) -> Any:
        def hook(module: nn.Module, args: Any, *rest: Any) -> None:
            tokens = rest[-1] if kind.startswith("out") else (args[0] if args else rest[0]["x"])
            seen.append((kind, tokens.shape[1]))

        return hook

    model.blocks[1].register_forward_hook(note("out before"))
    model.blocks[1].register_forward_pre_hook(note("in before"), with_kwargs=True)
    tokenprune.patch(model, "top_k", schedule={0: 0.8, 1: 0.6})
    model.blocks[1].register_forward_hook(note("out behind"))
    model.blocks[1].register_forward_pre_hook(note("in behind"), with_kwargs=True)
    run(model, x)
    places = tokenprune.report(model).to_dict()["places"]
    full = patches(model)
    first, second = (place["tokens_out"] for place in places)
    assert second < first < full
    prefix = seen[0][1] - first
    assert prefix == tokenprune.report(model).to_dict()["num_prefix_tokens"]
    assert sorted(seen) == sorted(
        [(f"in {when}", prefix + first) for when in ("before", "behind")]
        + [(f"out {when}", prefix + second) for when in ("before", "behind")]
    )
    tokenprune.unpatch(model)
    seen.clear()
    run(model, x)
    assert [tokens for _, tokens in seen] == [prefix + full] * 4


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", ["output", "input"])
def test_a_hook_that_replaces_the_tokens(family: str, kind: str) -> None:
    """A new tensor between two blocks is still the same tokens: the result is as if the block had computed it."""
    model, twin = patched(family), patched(family)
    x = images(model)
    if kind == "output":
        model.blocks[1].register_forward_hook(lambda module, args, output: output * 2.0)
    else:
        model.blocks[2].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] * 2.0, *args[1:]), kwargs), with_kwargs=True
        )
    twin.blocks[1].register_forward_hook(lambda module, args, output: (output.mul_(2.0), None)[1])
    assert torch.equal(run(model, x), run(twin, x))
    assert torch.equal(model.forward_features(x), twin.forward_features(x))
    assert not torch.equal(run(model, x), run(patched(family), x))


def test_backward_hooks_fire() -> None:
    model = patched("class_token")
    seen: list[int] = []
    model.blocks[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape[1]))
    model(images(model)).sum().backward()
    assert seen == [1 + tokenprune.report(model).to_dict()["places"][1]["tokens_out"]]


class LowRank(nn.Module):
    """A linear layer and a low-rank update, as LoRA libraries put in its place."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(rank)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def add_low_rank(model: nn.Module) -> None:
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if name in ("qkv", "proj", "fc1", "fc2", "q_proj", "v_proj") and isinstance(child, nn.Linear):
                setattr(module, name, LowRank(child))


def merged_low_rank(model: nn.Module) -> None:
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRank):
                with torch.no_grad():
                    child.base.weight += child.up @ child.down
                setattr(module, name, child.base)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "parallel" not in family])
def test_low_rank_adapters(family: str) -> None:
    """Added before or behind the patch, the update is part of the attention that is scored: as if merged."""
    plain = build(family)
    x = images(plain)
    add_low_rank(plain)
    host_only = copy.deepcopy(plain)
    before = copy.deepcopy(plain)
    merged = copy.deepcopy(plain)
    merged_low_rank(merged)
    tokenprune.patch(before, "top_k", keep=0.5)
    reduced = run(before, x)
    tokenprune.unpatch(before)
    assert torch.equal(run(before, x), run(host_only, x))
    if family in ("bias_own_table", "rotary"):  # these multiply by qkv.weight: a module in its place has no effect
        return
    tokenprune.patch(merged, "top_k", keep=0.5)
    torch.testing.assert_close(reduced, run(merged, x), rtol=1e-3, atol=1e-3)
    behind = build(family)
    tokenprune.patch(behind, "top_k", keep=0.5)
    add_low_rank(behind)
    torch.testing.assert_close(run(behind, x), reduced)
    merged_low_rank(behind)
    torch.testing.assert_close(run(behind, x), reduced, rtol=1e-3, atol=1e-3)


OTHER_PROCESS = """
import pickle, sys
model, x, expected = pickle.load(open(sys.argv[1], "rb"))
import torch
for _ in range(150):  # each takes a number that a hook of the patch may have
    model.blocks[3].register_forward_hook(lambda *call: None).remove()
assert torch.equal(model(x), expected)
"""


def test_a_pickle_in_another_process_keeps_its_hooks_apart_from_the_users(tmp_path) -> None:
    model = patched("class_token")
    x = images(model)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, x, run(model, x))))
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "model.pickle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_hook_that_writes_into_a_restored_block() -> None:
    """What is behind it sees what it wrote, as in the unpatched model."""

    def erase(module: nn.Module, args: object, output: Tensor) -> None:
        output[:, 1:] = 0

    model = build("class_token")
    tokenprune.patch(model, "tome", keep=0.5)
    x = images(model)
    with torch.no_grad():
        before = model.forward_intermediates(x)[1][-1]
        handle = model.blocks[1].register_forward_hook(erase)
        written = model.forward_intermediates(x)[1][-1]
        handle.remove()
        handle = model.blocks[1].register_forward_hook(lambda m, a, o: torch.cat([o[:, :1], 0 * o[:, 1:]], 1))
        returned = model.forward_intermediates(x)[1][-1]
        handle.remove()
    assert (written - before).abs().max() > 0.01
    torch.testing.assert_close(written, returned)


def test_replicas_as_data_parallel_makes_them() -> None:
    """A replica shares the hooks and has tensors of its own."""
    for family in FEW:
        model = patched(family)
        x = images(model)
        reduced = run(model, x)
        replica = replicate(model, torch.float64)
        got = run(replica, x.double())
        assert got.dtype == torch.float64, family
        torch.testing.assert_close(got.float(), reduced, rtol=1e-3, atol=1e-3)
        assert torch.equal(run(model, x), reduced)


def replicate(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What torch.nn.parallel.replicate does without devices: module.__dict__ copied, tensors converted."""
    copies: dict[nn.Module, nn.Module] = {
        module: module._replicate_for_data_parallel()
        for module in model.modules()  # type: ignore[operator]
    }
    for module, replica in copies.items():
        for key, child in module._modules.items():
            if child is not None:
                setattr(replica, key, copies[child])
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter.detach().to(dtype))
        for key, buffer in module._buffers.items():
            replica._buffers[key] = buffer.to(dtype) if buffer is not None and buffer.is_floating_point() else buffer
    return copies[model]


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks.train_one_rank, (str(tmp_path),), nprocs=2)
    model = patched("class_token", "tome")
    F.mse_loss(model(images(model, 4)), torch.zeros(4, 1000)).backward()
    grads = torch.load(tmp_path / "grads")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_wrapped_in_data_parallel_classes_the_model_is_found() -> None:
    model = build("class_token")
    wrapped = nn.DataParallel(model)
    tokenprune.patch(wrapped, "top_k", keep=0.5)
    assert tokenprune.report(model).to_dict()["method"] == "top_k"
    tokenprune.unpatch(wrapped)
