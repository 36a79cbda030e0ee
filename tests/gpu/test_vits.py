"""Patched vision transformers on a GPU: as on the CPU, without a wait of the host, compiled, captured, in halves."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FEW, METHODS, build, images, options, run
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError

PAIRS = [(family, method) for family in FEW for method in METHODS]
# timm makes the rotary table of "rotary_registers" on the CPU in each forward, and waits for its way to the device.
ASYNCHRONOUS = [pair for pair in PAIRS if pair[0] != "rotary_registers"]
# The solver behind the estimate of tokens that are dropped beside merging waits for the device.
ESTIMATED = {(family, method) for family in ("bias_own_table", "map_pool") for method in ("tofu", "diffrate")}
CAPTURED = [pair for pair in ASYNCHRONOUS if pair not in ESTIMATED]
ADAPTIVE = ("ats",)


def patched(family: str, method: str) -> tuple[nn.Module, Tensor]:
    model = tokenprune.patch(build(family), method, keep=0.5, **options(family, method))
    return model, images(model)


def sources(model: nn.Module, x: Tensor) -> list[Tensor]:
    with tokenprune.record(model) as recording:
        run(model, x)
    return [place.source.cpu() for place in recording.forwards[0].places]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_as_on_the_cpu(family: str, method: str) -> None:
    model, x = patched(family, method)
    expected, kept = run(model, x), sources(model, x)
    model, x = model.cuda(), x.cuda()
    assert all(torch.equal(*pair) for pair in zip(sources(model, x), kept, strict=True))
    torch.testing.assert_close(run(model, x).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_at_one_bit_for_bit(family: str) -> None:
    model = build(family).cuda()
    x = images(model).cuda()
    plain = run(model, x)
    assert torch.equal(run(tokenprune.patch(model, "tome", keep=1.0), x), plain)
    tokenprune.patch(model, "tome", keep=0.5)
    assert torch.equal(run(tokenprune.unpatch(model), x), plain)


@pytest.mark.parametrize(("family", "method"), ASYNCHRONOUS)
def test_the_host_never_waits(family: str, method: str) -> None:
    model, x = patched(family, method)
    model, x = model.cuda(), x.cuda()
    expected = run(model, x)  # the first forward may: it solves the budget and tunes kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = run(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("family", "method"), CAPTURED)
def test_captured_in_a_graph(family: str, method: str) -> None:
    model, x = patched(family, method)
    model, x = model.cuda(), x.cuda()
    other = images(model, seed=1).cuda()
    expected = run(model, other)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(model, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(model, x)
    x.copy_(other)
    graph.replay()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("family", "method"), [("class_token", method) for method in METHODS])
def test_compiled(family: str, method: str, mode: str) -> None:
    torch._dynamo.reset()
    model, x = patched(family, method)
    model, x = model.cuda(), x.cuda()
    expected = run(model, x)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        torch.testing.assert_close(run(compiled, x).clone(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_halves_and_autocast(family: str, method: str, dtype: torch.dtype) -> None:
    model, x = patched(family, method)
    model, x = model.cuda(), x.cuda()
    expected = run(model, x)
    with torch.autocast("cuda", dtype):
        cast = run(model, x)
    half = run(copy.deepcopy(model).to(dtype), x.to(dtype))
    for output in (cast, half):
        assert output.isfinite().all()
        assert (output.float() - expected).norm() < 0.5 * expected.norm()  # a token more or less, not another picture


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_count_of_its_own_for_each_image(method: str) -> None:
    model = tokenprune.patch(build("class_token"), method, keep=0.5)
    x = images(model, 5)
    expected, kept = run(model, x), sources(model, x)
    model, x = model.cuda(), x.cuda()
    assert all(torch.equal(*pair) for pair in zip(sources(model, x), kept, strict=True))
    torch.testing.assert_close(run(model, x).cpu(), expected, rtol=1e-3, atol=1e-3)
    half = run(copy.deepcopy(model).half(), x.half()).float()
    assert half.isfinite().all()


def test_another_device_needs_a_patch_no_more_than_a_model_does() -> None:
    model, x = patched("class_token", "zero_tprune")
    first = run(model.cuda(), x.cuda())
    torch.testing.assert_close(run(model.cpu(), x), first.cpu(), rtol=1e-3, atol=1e-3)
    with pytest.raises((RuntimeError, TokenPruneError)):
        run(model, x.cuda())
