"""The timings of denoisers: what is timed is what is named, and the masks are as large as asked."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.evals import denoiser_speed, region_speed
from tokenprune.evals.digits_denoisers import untrained
from tokenprune.evals.stopwatch import Stopwatch

SMALL = denoiser_speed.Level("tiny", 8, 32, 3, 4, 16)


class Slow(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x


def test_the_stopwatch_runs_while_its_module_does() -> None:
    model, clock = nn.Sequential(Slow(0.05), Slow(0.01)), Stopwatch()
    clock.watch(model[1])
    before = clock()
    for _ in range(3):
        model(torch.zeros(1))
    assert 0.03 <= clock() - before < 0.1


def test_the_stack_is_the_level() -> None:
    model = denoiser_speed.unet(SMALL)
    stack = model.get_submodule("down_blocks.0.attentions.0")
    assert len(stack.transformer_blocks) == SMALL.depth
    assert stack.transformer_blocks[0].attn1.heads == SMALL.heads
    assert sum(type(module).__name__ == "Transformer2DModel" for module in model.modules()) == 1
    tokens = []
    stack.transformer_blocks[0].register_forward_hook(lambda module, args, output: tokens.append(output.shape))
    model(torch.randn(1, 4, 8, 8), torch.tensor(100), torch.randn(1, 77, 16))
    assert tokens == [(1, SMALL.side**2, SMALL.channels)]


@pytest.mark.parametrize(("method", "options"), [("uniform", {"keep": 0.5}), ("at_edm", {})])
def test_the_patch_acts_in_the_timed_stack(method: str, options: dict[str, float]) -> None:
    seen: list[int] = []
    steps: list[torch.Tensor] = []

    def patch(model: nn.Module) -> None:
        tokenprune.patch(model, method, steps={}, **options)
        inner = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.1.ff")
        inner.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        model.register_forward_pre_hook(lambda module, args, named: steps.append(named["timestep"]), with_kwargs=True)

    stack = "down_blocks.0.attentions.0"
    timing = denoiser_speed.compare(SMALL, patch, f"{stack}.transformer_blocks.1", rounds=20, attempts=1)
    assert timing.seconds > 0
    assert set(seen) == {32 if method == "uniform" else 24}
    assert len({float(step) for step in steps}) == len(steps)  # on the same step again no tokens are chosen


def test_the_tomesd_package_sees_its_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, which as the package takes the size from the model's first argument."""
    sizes: list[tuple[int, int]] = []

    def apply_patch(model: nn.Module, *, ratio: float, max_downsample: int) -> nn.Module:
        assert (ratio, max_downsample) == (0.5, 1)
        model.register_forward_pre_hook(lambda module, args: sizes.append((args[0].shape[2], args[0].shape[3])))
        return model

    monkeypatch.setitem(sys.modules, "tomesd", SimpleNamespace(apply_patch=apply_patch))
    inputs = {"sample": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 77, 16)}
    row = denoiser_speed.against_package("tiny", denoiser_speed.unet(SMALL), inputs, 1, 20, 1)
    assert row["what"] == "tiny"
    assert row["speedup"] > 0
    assert set(sizes) == {(8, 8)}
    assert len(sizes) >= 2 * 20


@pytest.mark.parametrize("share", region_speed.SHARES)
def test_masks_cover_their_share(share: float) -> None:
    assert region_speed.square(64, share).mean().item() == pytest.approx(share, abs=0.02)


def test_a_smaller_mask_is_faster() -> None:
    latents = torch.randn(4, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    table = region_speed.region_table(
        untrained("dit-digits"), region_speed.digits, latents, shares=(0.05, 0.8), steps=3, rounds=5
    )
    small, large = (row["time"] for row in table.rows)
    assert small < 0.8 * large < large


def test_a_step_under_a_mask_is_less_than_one_that_computes_all() -> None:
    """Counted, as a busy machine's clock says little; what is timed are the same steps."""
    latents = torch.randn(4, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    model = untrained("dit-digits")
    counts = []
    for one, step in ((model, 0), (copy := region_speed.masked(model, latents, 0.1, (0,)), 1), (copy, 0), (copy, 2)):
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            region_speed.digits(one, latents, step)
        counts.append(counter.get_total_flops())
    whole, _, later, dense = counts  # the first forward of a patch also counts what it costs
    assert later / whole < 0.6 < 0.9 < dense / whole
    (row,) = region_speed.step_table(model, region_speed.digits, latents, 0.1, rounds=6).rows
    assert row["step"] < row["dense step"]
    assert row["time"] == pytest.approx((row["dense step"] + 19 * row["step"]) / 20)
    assert row["early"] == pytest.approx((6 * row["dense step"] + 44 * row["step"]) / 50)
