"""`compile_repeated_blocks` on patched denoisers, before the patch and after it."""

import pytest
import torch
from denoisers_zoo import build, run, traces
from torch._dynamo.backends.debugging import aot_eager

import tokenprune

torch.set_num_threads(1)
SETTINGS = {"keep": 0.5, "steps": {}}


class Counting:
    """aot_eager, counting its graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return aot_eager(module, inputs)


def outputs(model, inputs, sizes=1):
    """Of a row of sizes, each at two steps."""
    found = []
    for size in ((1, 16, 12), (3, 16, 16), (2, 12, 8))[:sizes]:
        x = inputs(*size)
        found += [run(model, x), run(model, {**x, "timestep": x["timestep"] * 0.5})]
    return found


def compiled(model):
    counting = Counting()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counting)
    return counting


def equal(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def forget_compiled(model):
    for module in model.modules():
        vars(module).pop("_compiled_call_impl", None)


# What scores queries and keys adds the graphs of the scored block, and where a transformer's block takes more by token
# than its hidden states a second number of tokens adds some.
@pytest.mark.parametrize(
    ("name", "method", "sizes"),
    [
        ("qwenimage", "at_edm", 1),
        *(
            pytest.param(name, method, 3, marks=pytest.mark.full)
            for name, method in (
                ("unet_sdxl", "at_edm"),
                ("unet_sdxl", "random"),
                ("unet_sdxl", "tomesd"),
                ("unet_sdxl", "toma"),
                ("unet_sdxl", "todo"),
                ("flux", "at_edm"),
                ("flux", "random"),
                ("wan", "random"),
                ("qwenimage", "at_edm"),
            )
        ),
    ],
)
def test_compiled_blocks_are_patched_in_either_order(name, method, sizes):
    model, inputs = build(name)
    before, plain = traces(model), outputs(model, inputs, sizes)
    tokenprune.patch(model, method, **SETTINGS)
    patched = outputs(model, inputs, sizes)
    assert not equal(patched, plain)
    compiling = compiled(model)  # patched already
    assert equal(outputs(model, inputs, sizes), patched)
    after = compiling.graphs
    tokenprune.unpatch(model)
    assert equal(outputs(model, inputs, sizes), plain)
    assert compiling.graphs > after  # it is compiled still
    forget_compiled(model)
    assert traces(model) == before

    compiling = compiled(model)
    assert equal(outputs(model, inputs, sizes), plain)
    unpatched = compiling.graphs
    tokenprune.patch(model, method, **SETTINGS)  # compiled already
    assert equal(outputs(model, inputs, sizes), patched)
    assert compiling.graphs - unpatched == after
    alike = method in ("tomesd", "toma", "todo") or (name, method) == ("unet_sdxl", "random")
    assert after <= unpatched * (1 if alike else 2), f"{after} graphs, unpatched {unpatched}"
    tokenprune.unpatch(model)
    assert equal(outputs(model, inputs, sizes), plain)
    forget_compiled(model)
    assert traces(model) == before


@pytest.mark.parametrize("order", ["patch", "compile"])
def test_methods_over_steps_refuse_compiled_blocks(order):
    model, inputs = build("flux")
    if order == "patch":
        tokenprune.patch(model, "ras")
    compiled(model)
    if order == "compile":
        tokenprune.patch(model, "ras")
    with pytest.raises(tokenprune.UnsupportedMethod, match=r"without compile_repeated_blocks\(\)"):
        run(model, inputs(1, 16, 12))


@pytest.mark.full
def test_what_compiles_the_whole_model_is_patched():
    model, inputs = build("flux")
    x = inputs(2, 16, 12)
    tokenprune.patch(model, "random", **SETTINGS)
    patched = run(model, x)
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager"), x), patched)


def test_compiled_code_of_an_unknown_kind_is_refused():
    model, _ = build("flux")
    model.transformer_blocks[1]._compiled_call_impl = lambda *args, **kwargs: None
    with pytest.raises(tokenprune.UnsupportedModel, match="patch the model first, then compile it"):
        tokenprune.patch(model, "random", keep=0.5)
