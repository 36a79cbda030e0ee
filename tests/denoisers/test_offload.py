"""Offloading of patched denoisers, switched on before and after: weights that are elsewhere between two forwards."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from denoisers_zoo import build, nothing_is_left, run
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
)

import tokenprune

torch.set_num_threads(1)


def sequential(model, folder):
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert all(weight.is_meta for weight in model.parameters())


def whole(model, folder):
    cpu_offload_with_hook(model, torch.device("cpu"))


def to_disk(model, folder):
    blocks = "transformer_blocks" if hasattr(model, "transformer_blocks") else "mid_block"
    own = [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]
    devices = {name: "disk" if name == blocks else "cpu" for name in own}
    dispatch_model(model, devices, main_device="cpu", offload_dir=folder, force_hooks=True)
    assert any(weight.is_meta for weight in getattr(model, blocks).parameters())


def in_groups(model, folder):
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)


def by_layers(model, folder):
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="leaf_level")


def switch_off(model):
    remove_hook_from_module(model, recurse=True)
    if hasattr(model, "_diffusers_hook"):
        for name in (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
            HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)


def case(offload, name, method, **arguments):
    marks = [pytest.mark.full] if (offload, name, method) not in DEFAULT else []
    named = f"{offload.__name__}-{name}-{method}"
    return pytest.param(offload, name, {"method": method, **arguments}, id=named, marks=marks)


DEFAULT = {
    (sequential, "pixart", "at_edm"),
    (sequential, "dit", "toca"),
    (in_groups, "flux", "at_edm"),
}
EDM, MASK = {"keep": 0.4, "steps": {}}, torch.eye(8, 6).bool()
METHODS = {
    "at_edm": EDM,
    "random": {"keep": 0.4},
    "toca": {},
    "region": {"mask": MASK},
    "tomesd": {"keep": 0.5},
    "todo": {"keep": 0.5},
}
CASES = [
    case(offload, name, method, **METHODS[method])
    for offload in (sequential, whole, to_disk, in_groups, by_layers)
    for name, methods in (
        ("pixart", ("at_edm", "region", "tomesd", "todo")),
        ("dit", ("at_edm", "toca") if offload in (sequential, whole, to_disk) else ()),  # no groups there
        ("flux", ("at_edm", "random", "region")),
        ("sd3", ("random", "at_edm")),
        ("unet_sdxl", ("at_edm",)),
    )
    for method in methods
    if not (offload is to_disk and name == "flux" and method == "region")
]


@pytest.mark.parametrize(("offload", "name", "arguments"), CASES)
def test_offloaded_weights_are_patched_in_either_order(offload, name, arguments, tmp_path):
    model, inputs = build(name)
    size = (1, 16, 16) if name == "dit" else (1, 16, 12)
    runs = [{**(x := inputs(*size)), "timestep": x["timestep"] * share} for share in (1.0, 0.8)]
    plain = [run(model, x) for x in runs]
    tokenprune.patch(model, **arguments)
    patched = [run(model, x) for x in runs]
    assert not torch.equal(patched[1], plain[1])
    tokenprune.unpatch(model)
    for order in ("patch", "offload"):
        if order == "patch":
            tokenprune.patch(model, **arguments)
        offload(model, tmp_path)
        if order == "offload":
            tokenprune.patch(model, **arguments)
        assert all(map(torch.equal, [run(model, x) for x in runs], patched))
        if order == "offload":
            tokenprune.unpatch(model)
            assert all(map(torch.equal, [run(model, x) for x in runs], plain))
        switch_off(model)
        tokenprune.unpatch(model)
        assert all(map(torch.equal, [run(model, x) for x in runs], plain))
    assert nothing_is_left(model)
