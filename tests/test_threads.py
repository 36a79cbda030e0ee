"""Promise 2 and the state of a forward: threads that share one model do not see each other's tokens."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import timm
import torch
import zoo
from families import FAMILIES, build, images, options, run
from torch import Tensor, nn

import tokenprune

THREADS = 4


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
