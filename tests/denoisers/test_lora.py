"""LoRA on patched denoisers: loaded before the patch and after it, fused, and unloaded."""

import pytest
import torch
from denoisers_zoo import build, nothing_is_left, run
from peft import LoraConfig

import tokenprune

torch.set_num_threads(1)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


def load(model):
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), adapter_name="style")
    # A strong one makes a U-Net so steep that fusing it into the weights, which rounds, changes the output by itself.
    strength = 0.2 if "unet" in type(model).__name__.lower() else 1.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(strength * torch.randn(weight.shape, generator=generator))
    model.eval()


EDM, MASK = {"method": "at_edm", "keep": 0.4, "steps": {}}, torch.eye(8, 6).bool()
CASES = [("flux", EDM)]
MORE = [
    ("flux", {"method": "region", "mask": MASK, "dense_steps": (0,)}),
    ("unet_sdxl", EDM),
    ("unet_sd", {**EDM, "keep": 0.5}),
    ("unet_sd", {"method": "region", "mask": MASK, "dense_steps": (0,)}),
    ("flux", {"method": "ras", "dense_steps": (0,)}),
    ("sd3", {"method": "toca"}),
    ("unet_sd", {"method": "tomesd", "keep": 0.5}),
    ("unet_sdxl", {"method": "todo", "keep": 0.5}),
]


@pytest.mark.parametrize(
    ("name", "arguments"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)]
)
def test_lora_is_loaded_fused_and_unloaded_on_a_patched_model(name, arguments):
    model, inputs = build(name)
    x = inputs(1, 16, 12)

    def outputs():
        return [run(model, {**x, "timestep": x["timestep"] * share}) for share in (1.0, 0.8, 0.6)]

    plain = outputs()
    tokenprune.patch(model, **arguments)
    patched = outputs()
    tokenprune.unpatch(model)
    load(model)
    styled = outputs()
    tokenprune.patch(model, **arguments)
    expected = outputs()
    for found, other in ((expected, patched), (expected, styled)):
        assert not torch.allclose(found[-1], other[-1], rtol=1e-2)
    tokenprune.unpatch(model)
    assert all(map(torch.equal, outputs(), styled))
    model.delete_adapters("style")
    model.unload_lora()
    assert all(map(torch.equal, outputs(), plain))

    tokenprune.patch(model, **arguments)
    outputs()
    load(model)
    assert all(map(torch.equal, outputs(), expected))
    model.fuse_lora()
    for found, one in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-4 * float(one.abs().max()))
    model.unfuse_lora()
    model.disable_adapters()
    assert not torch.allclose(outputs()[-1], expected[-1], rtol=1e-2)
    model.enable_adapters()
    model.unload_lora()
    for found, one in zip(outputs(), patched, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-4 * float(one.abs().max()))
    tokenprune.unpatch(model)
    for found, one in zip(outputs(), plain, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-4 * float(one.abs().max()))
    assert nothing_is_left(model)


@pytest.mark.full
def test_unpatched_with_lora_loaded_meanwhile_nothing_is_left():
    model, inputs = build("unet_sdxl")
    x = inputs(1, 16, 12)
    tokenprune.patch(model, "at_edm", keep=0.4, steps={})
    run(model, x)
    load(model)
    tokenprune.unpatch(model)
    model.unload_lora()
    assert nothing_is_left(model)
