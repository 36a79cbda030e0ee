"""How much a patch adds to what the host starts in a forward: on a GPU each operation takes it some 20 microseconds."""

from collections import Counter

import pytest
import torch
from denoisers_zoo import build, run
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune

torch.set_num_threads(1)


class Operations(TorchDispatchMode):
    """Counts operations by name, views apart."""

    def __init__(self):
        super().__init__()
        self.started = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function._schema.returns
        view = bool(results) and results[0].alias_info is not None and not results[0].alias_info.is_write
        if not view:
            self.started[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def later_step(model, inputs):
    """What the third step of a run starts: tables of a size are made at the first, and sets of a run at the second."""
    for timestep in (900.0, 880.0):
        run(model, {**inputs, "timestep": torch.tensor(timestep)})
    with Operations() as operations:
        run(model, {**inputs, "timestep": torch.tensor(860.0)})
    return operations.started


MASK = torch.zeros(16, 16).bool()
MASK[:5] = True


# The bounds are what was counted: of 36 blocks in 7 stacks, on a CPU, where gathering and merging take more operations
# than on a GPU.
@pytest.mark.parametrize(
    ("method", "options", "bound"),
    [
        ("uniform", {"keep": 0.5}, 207),
        ("at_edm", {"keep": 0.5, "steps": {}}, 228),
        ("tomesd", {"ratio": 0.5, "max_downsample": 8}, 1424),
        ("region", {"mask": MASK}, 146),
    ],
)
def test_few_operations_are_added_and_none_waits_for_the_device(method, options, bound):
    model, inputs = build("unet_sdxl")
    x = inputs(2, 16, 16)
    plain = later_step(model, x)
    tokenprune.patch(model, method, **options)
    added = later_step(model, x)
    added.subtract(plain)
    # The timestep is read, and told to what is random as a tensor.
    for name, most in (("_local_scalar_dense", 1), ("lift_fresh", 1), ("nonzero", 0), ("equal", 0)):
        assert added[f"aten.{name}"] <= most, f"{name}: {added[f'aten.{name}']}"
    assert sum(added.values()) <= bound, sorted(added.items(), key=lambda item: -item[1])
