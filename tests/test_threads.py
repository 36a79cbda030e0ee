"""Promise 2 and the state of a forward: threads that share one model do not see each other's tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import denoisers_zoo
import hf_families
import lvlm_zoo
import pytest
import timm
import torch
import windows_zoo
import zoo
from families import FAMILIES, build, images, options, run
from torch import Tensor, nn

import tokenprune
from tokenprune.evals import bench
from tokenprune.evals.throughput import measure

THREADS = 4
Use = Callable[[nn.Module], Tensor]


def _timm(seed: int) -> tuple[nn.Module, Use]:
    return build("class_token"), lambda model: run(model, images(model, 2 + seed, seed))


def _swin(seed: int) -> tuple[nn.Module, Use]:
    x = windows_zoo.images(batch=2 + seed, seed=seed)
    return windows_zoo.build(), lambda model: run(model, x)


def _tower(seed: int) -> tuple[nn.Module, Use]:
    x = hf_families.images(2 + seed, seed=seed)
    return hf_families.build("clip"), lambda model: hf_families.call(model, x).last_hidden_state


def _lvlm(seed: int) -> tuple[nn.Module, Use]:
    inputs = lvlm_zoo.prompt("llava", seed, images=1 + seed).inputs
    return lvlm_zoo.build("llava"), lambda model: lvlm_zoo.generate(model, inputs, 3)[1]


def _denoiser(name: str, seed: int) -> tuple[nn.Module, Use]:
    model, inputs = denoisers_zoo.build(name)
    given = inputs(1 + seed, 4, 4)
    return model, lambda model: denoisers_zoo.run(model, given)


# Of each family a model and one use of it, by a number that makes the inputs, and how it is patched.
OF_FAMILIES: dict[str, tuple[Callable[[int], tuple[nn.Module, Use]], dict[str, Any]]] = {
    "timm ViT": (_timm, {"method": "tome", "keep": 0.5}),
    "Swin": (_swin, {"method": "sparsevit", "flops": 0.7}),
    "tower of transformers": (_tower, {"method": "zero_tprune", "keep": 0.5}),
    "vision-language model": (_lvlm, {"method": "fastv", "keep": 0.5}),
    "U-Net": (partial(_denoiser, "unet_sd"), {"method": "tomesd", "flops": 0.9}),
    "DiT": (partial(_denoiser, "dit"), {"method": "at_edm", "keep": 0.5, "steps": {}}),
}


def together(model: nn.Module, inputs: list[Tensor], repeats: int = 4) -> list[list[Tensor]]:
    barrier = Barrier(THREADS)

    def work(x: Tensor) -> list[Tensor]:
        barrier.wait()
        return [run(model, x) for _ in range(repeats)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_with_different_batches(family: str) -> None:
    model = tokenprune.patch(build(family), "tome", keep=0.5, **options(family, "tome"))
    inputs = [images(model, batch, seed=batch) for batch in range(1, THREADS + 1)]
    serial = [run(model, x) for x in inputs]
    for outputs, expected in zip(together(model, inputs), serial, strict=True):
        assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("method", ["tome", "zero_tprune", "top_k"])
def test_threads_with_different_sizes_and_the_first_forward_of_each(method: str) -> None:
    shape = {"depth": 4, "embed_dim": 96, "num_heads": 4, "img_size": (20, 28), "patch_size": 4}
    model = timm.create_model("vit_small_patch16_dinov3", dynamic_img_size=True, num_classes=5, **shape).eval()
    zoo.randomise(model, 0)
    inputs = [torch.randn(2, 3, 20 + 4 * i, 28 - 4 * i) for i in range(THREADS)]
    tokenprune.patch(model, method, flops=0.6)
    twin = copy.deepcopy(model)
    serial = [run(twin, x) for x in inputs]
    for outputs, expected in zip(together(model, inputs), serial, strict=True):
        assert all(torch.equal(output, expected) for output in outputs)


def test_threads_with_different_patched_models_and_dense_outputs() -> None:
    models = [tokenprune.patch(build(f), "tome", keep=0.5) for f in ("class_token", "rotary", "bias_own_table")]
    models.append(models[0])
    inputs = [images(model) for model in models]
    serial = [model.forward_features(x) for model, x in zip(models, inputs, strict=True)]
    barrier = Barrier(THREADS)

    def work(model: nn.Module, x: Tensor) -> list[Tensor]:
        barrier.wait()
        return [model.forward_features(x) for _ in range(4)]

    with ThreadPoolExecutor(THREADS) as pool:
        for outputs, expected in zip(pool.map(work, models, inputs), serial, strict=True):
            assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the autograd engine does on an accelerator: the re-run of a checkpointed block is in a thread of its own."""
    model = tokenprune.patch(build("class_token"), "tome", keep=0.5).train()
    x = images(model)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(timm.layers.config, "_USE_REENTRANT_CKPT", reentrant)
    model.set_grad_checkpointing(True)
    loss = model(x).square().mean()
    run(model, images(model, 5))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each gives, all begun together in threads of their own."""
    barrier = Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_each_thread_has_a_patched_model(family: str) -> None:
    make, patch = OF_FAMILIES[family]
    both = [make(seed) for seed in range(2)]
    expected = [use(tokenprune.patch(model, **patch)).clone() for model, use in both]
    reports = [tokenprune.report(model).to_dict() for model, _ in both]

    def work(model: nn.Module, use: Use) -> tuple[list[Tensor], dict[str, Any]]:
        return [use(model) for _ in range(4)], tokenprune.report(model).to_dict()

    found = at_once(*(partial(work, model, use) for model, use in both))
    for (outputs, told), output, report in zip(found, expected, reports, strict=True):
        assert all(torch.equal(one, output) for one in outputs)
        assert told == report


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_one_thread_patches_and_unpatches_while_another_runs(family: str) -> None:
    make, patch = OF_FAMILIES[family]
    (changing, use), (running, other_use) = make(0), make(1)
    plain = use(changing).clone()
    patched = use(tokenprune.patch(changing, **patch)).clone()
    tokenprune.unpatch(changing)
    expected = other_use(tokenprune.patch(running, **patch)).clone()
    assert not torch.equal(plain, patched)

    def change() -> list[tuple[Tensor, Tensor]]:
        return [(use(tokenprune.patch(changing, **patch)), use(tokenprune.unpatch(changing))) for _ in range(4)]

    pairs, outputs = at_once(change, lambda: [other_use(running) for _ in range(8)])
    assert all(torch.equal(one, patched) and torch.equal(other, plain) for one, other in pairs)
    assert all(torch.equal(output, expected) for output in outputs)


def test_models_of_all_families_at_once() -> None:
    made = [(make(0), patch) for make, patch in OF_FAMILIES.values()]
    expected = [use(tokenprune.patch(model, **patch)).clone() for (model, use), patch in made]
    found = at_once(*(lambda model=model, use=use: [use(model) for _ in range(3)] for (model, use), _ in made))
    for outputs, output in zip(found, expected, strict=True):
        assert all(torch.equal(one, output) for one in outputs)


def test_bench_and_report_from_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.__globals__, "measure", partial(measure, sample_seconds=0))
    models = [build("class_token"), build("rotary")]
    budgets = [{"keep": 0.5}, {"flops": 0.7}]

    def work(model: nn.Module, budget: dict[str, float]) -> tuple[list[dict[str, Any]], str]:
        rows = bench(model, images(model), ["tome", "top_k"], [budget]).rows
        with tokenprune.patched(model, "tome", **budget):
            run(model, images(model))
            told = str(tokenprune.report(model))
        return [{name: row.get(name) for name in ("method", "budget", "flops_ratio", "tokens")} for row in rows], told

    alone = [work(model, budget) for model, budget in zip(models, budgets, strict=True)]
    assert at_once(*(partial(work, *one) for one in zip(models, budgets, strict=True))) == alone
