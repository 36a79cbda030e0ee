"""How many operations a patch dispatches: on a GPU each costs the host some twenty microseconds, whatever it does."""

from __future__ import annotations

from typing import Any

import pytest
from families import build, images, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune

PLACES = (0, 1, 2)
# At most so many in these places, of which the eager kernels make a part (on a GPU a merge is one launch).
MOST = {"uniform": 33, "random": 75, "top_k": 39, "evit": 75, "tome": 115, "zero_tprune": 129}


class Count(TorchDispatchMode):
    """Operations that compute something; a view costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not any(out.alias_info and not out.alias_info.is_write for out in func._schema.returns)
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, x: Tensor) -> int:
    run(model, x)
    with Count() as count:
        run(model, x)
    return count.operations


@pytest.mark.parametrize("method", MOST)
def test_places_dispatch_few_operations(method: str) -> None:
    model = build("class_token")
    x = images(model)
    plain = operations(model, x)
    schedule = {place: 0.9 - 0.1 * place for place in PLACES}
    tokenprune.patch(model, method, schedule=schedule, prefix_only_last=False)
    assert operations(model, x) - plain <= MOST[method]


def test_a_block_that_reduces_nothing_dispatches_none() -> None:
    model = build("class_token")
    x = images(model)
    plain = operations(model, x)
    tokenprune.patch(model, "top_k", schedule={3: 0.5}, prefix_only_last=False)
    last = operations(model, x)
    tokenprune.patch(model, "top_k", schedule={0: 0.5}, prefix_only_last=False)
    assert operations(model, x) == last > plain
