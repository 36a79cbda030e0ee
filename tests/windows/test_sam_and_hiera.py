"""The windows of SAM's encoder and the mask units of Hiera against loops over them."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import zoo
from naive_units import near, run_hiera, run_sam
from torch import Tensor, nn
from windows_zoo import hiera, images, sam

import tokenprune

torch.set_num_threads(1)


MODELS = {
    "sam": (sam, (44, 28), (0, 1, 3, 4)),
    "sam_rotary": (lambda: sam(use_rel_pos=False, use_rope=True), (44, 28), (0, 1, 3, 4)),
    "hiera": (hiera, (32, 48), (0, 1, 3, 4)),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_against_loops(name: str) -> None:
    build, size, places = MODELS[name]
    model, x = build(), images(size).double()
    plain, shares = run(model, x), dict(zip(places, (0.6, 0.4, 0.5, 0.3), strict=True))
    expected = run_hiera(model, x, shares)[0] if name == "hiera" else run_sam(model, x, shares)
    tokenprune.patch(model, "sparsevit", schedule=shares)
    assert (run(model, x) - plain).abs().max() > 0.01
    assert near(run(model, x), expected)


def test_recorded_units_are_where_they_lie_in_the_image() -> None:
    model, x = hiera(), images((32, 48)).double()
    computed = run_hiera(model, x, dict.fromkeys((0, 1, 3, 4), 0.4))[1]
    tokenprune.patch(model, "sparsevit", keep=0.4)
    with tokenprune.record(model) as recording:
        run(model, x)
    (forward,) = recording.forwards
    assert forward.grid == (16, 24)
    assert [place.grid for place in forward.places] == [(16, 24), (16, 24), (8, 12), (8, 12)]
    assert {int(place.name.split(".")[1]): place.kept.tolist() for place in forward.places} == computed


@pytest.mark.parametrize("name", MODELS)
def test_promises(name: str) -> None:
    build, size, places = MODELS[name]
    model, x = build(), images(size).double()
    plain, state = run(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    before = zoo.count(model, x[:1]).get_total_flops() // 2
    tokenprune.patch(model, "sparsevit", keep=1.0)
    assert torch.equal(run(model, x), plain)
    tokenprune.patch(model, "sparsevit", schedule=dict.fromkeys(places, 1.0))
    torch.testing.assert_close(run(model, x), plain, rtol=1e-9, atol=1e-9)
    flops = 0.85 if name == "hiera" else 0.7
    tokenprune.patch(model, "sparsevit", flops=flops)
    out, data = run(model, x), tokenprune.report(model).to_dict()
    assert data["flops_before"] == before
    assert data["flops_after"] == zoo.count(model, x[:1]).get_total_flops() // 2
    assert data["flops_ratio"] == pytest.approx(flops, abs=0.01)
    assert all("left alone" in why for why in data["skipped"].values())
    torch.testing.assert_close(torch.cat([run(model, one[None]) for one in x]), out, rtol=1e-9, atol=1e-9)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), out)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert len(maps) == (5 if name != "hiera" else 4)
        torch.testing.assert_close(model.forward_head(final), out)
    model.set_grad_checkpointing()
    model(x.requires_grad_()).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.set_grad_checkpointing(False)
    model.zero_grad()
    model(x).sum().backward()
    for one, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
    tokenprune.unpatch(model)
    assert torch.equal(run(model, x), plain)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_refused() -> None:
    model = sam()
    with pytest.raises(tokenprune.BudgetError, match="the blocks of windows are 0"):
        tokenprune.patch(model, "sparsevit", schedule={2: 0.5})
    with pytest.raises(tokenprune.BudgetError, match="published ratios"):
        tokenprune.patch(model, "sparsevit")
    with pytest.raises(tokenprune.UnsupportedModel, match="no block"):
        tokenprune.patch(sam(global_attn_indexes=tuple(range(5))), "sparsevit", keep=0.5)
    units = hiera()
    tokenprune.patch(units, "sparsevit", keep=0.5)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[:, ::2] = False
    with pytest.raises(tokenprune.UnsupportedModel, match="masked units"):
        units(images((32, 48), 1).double(), mask=mask)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_exported(name: str) -> None:
    torch._dynamo.reset()
    build, size, _ = MODELS[name]
    model, x = build(), images(size).double()
    tokenprune.patch(model, "sparsevit", keep=0.5)
    expected = run(model, x)
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)
    torch.testing.assert_close(run(torch.export.export(model, (x,)).module(), x), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256", "samvit_base_patch16"),
        *("hiera_tiny_224", "vit_medium_patch16_rope_reg1_gap_256"),
    ],
)
def test_real_sizes(name: str) -> None:
    """Built without values, and patched: costs are those of torch, whatever the size."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    x = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    before = zoo.count(model, x).get_total_flops() // 2
    if name.startswith("vit"):
        with pytest.raises(tokenprune.UnsupportedMethod, match="needs windows"):
            tokenprune.patch(model, "sparsevit", keep=0.5)
        return
    data = tokenprune.report(tokenprune.patch(model, "sparsevit", keep=0.5)).to_dict()
    assert data["flops_before"] == before
    assert data["flops_after"] == zoo.count(model, x).get_total_flops() // 2
