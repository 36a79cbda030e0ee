"""Budgets of denoisers at their published sizes on the meta device, as torch's counter sees the patched run."""

import re

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.evals.real_denoisers import flux, pixart, sd3, sd15, sdxl


def built(make):
    with torch.device("meta"):
        model, inputs = make()
    for name in ("time_text_embed", "adaln_single"):
        if hasattr(model, name):
            getattr(model, name).register_forward_pre_hook(to_meta, with_kwargs=True)
    return model.eval(), inputs


def to_meta(module, args, kwargs):
    """The timestep alone is a number, so that its place in the run is known."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))


def counted(model, inputs, share_of_noise):
    """Multiply-adds of a forward as torch's counter sees them, fused attention as products."""
    latents = "sample" if "sample" in inputs else "hidden_states"
    inputs = {**inputs, latents: inputs[latents].clone()}  # the same ones again would be the other call of guidance
    timestep = torch.tensor(1000.0 * share_of_noise)
    if not isinstance(model, diffusers.UNet2DConditionModel):  # these take one for each image, on their own device
        timestep = timestep.reshape(1) / (1000.0 if isinstance(model, diffusers.FluxTransformer2DModel) else 1.0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, timestep=timestep)
    return counter.get_total_flops() // 2


def mean_of_a_run(model, inputs):
    """Mean over 50 steps: in the first 30% of them `at_edm` leaves the stacks at the edges of the stages whole."""
    counted(model, inputs, 1.0)  # the first forward solves the budget, which the counter sees too
    early, late = (counted(model, inputs, share) for share in (1.0, 0.5))
    return (15 * early + 35 * late) / 50


@pytest.mark.full
def test_at_edm_on_sdxl_costs_what_the_paper_prints():
    # 4.1 to 4.5 of 6.7 TFLOP (table 1), one unguided forward a step, the mean over 50 steps.
    model, inputs = built(sdxl)
    whole = counted(model, inputs, 1.0)
    tokenprune.patch(model, "at_edm", keep=0.37)
    mean = mean_of_a_run(model, inputs)
    report = tokenprune.report(model).to_dict()
    assert 2e-12 * whole == pytest.approx(6.76, abs=0.05)
    assert 4.1 < 2e-12 * mean < 4.6
    assert report["flops_before"] == whole
    assert report["flops_after"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "flops"),
    [
        pytest.param(lambda: sd15(512), 0.8, id="sd15 at 512"),
        pytest.param(lambda: sd15(1024), 0.7, id="sd15 at 1024"),
        pytest.param(pixart, 0.6, id="pixart"),
        pytest.param(sd3, 0.6, id="sd3"),
        pytest.param(flux, 0.6, id="flux"),
    ],
)
def test_a_budget_is_met_within_one_percent(make, flops):
    model, inputs = built(make)
    whole = counted(model, inputs, 1.0)
    tokenprune.patch(model, "at_edm", flops=flops)
    assert mean_of_a_run(model, inputs) / whole == pytest.approx(flops, rel=0.01)
    assert tokenprune.report(model).to_dict()["flops_ratio"] == pytest.approx(flops, rel=0.01)


@pytest.mark.full
@pytest.mark.parametrize(("method", "expected"), [("random", 0.56), ("at_edm", 0.67)])
def test_below_the_floor_of_stacks_one_block_deep_the_floor_is_named(method, expected):
    # With every block skipped convolutions and residual blocks cost 0.557; at_edm's scores come on top.
    model, inputs = built(lambda: sd15(512))
    whole = counted(model, inputs, 1.0)
    tokenprune.patch(model, method, flops=0.5, steps={})
    with pytest.raises(tokenprune.BudgetError, match=r"still costs 0\.\d+ .* use flops=0\.\d+ or more") as told:
        counted(model, inputs, 1.0)
    floor = float(re.search(r"use flops=(0\.\d+)", str(told.value))[1])
    assert floor == pytest.approx(expected, abs=0.015)
    tokenprune.patch(model, method, flops=floor, steps={})
    counted(model, inputs, 1.0)
    assert counted(model, inputs, 1.0) / whole == pytest.approx(floor, rel=0.01)
