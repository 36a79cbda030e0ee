"""`tokenprune.record`: nested blocks, and patches that change inside one."""

from __future__ import annotations

import pytest
from families import build, images, run
from torch import Tensor, nn

import tokenprune


@pytest.fixture
def model() -> nn.Module:
    return tokenprune.patch(build("class_token"), "tome", keep=0.5)


@pytest.fixture
def x(model: nn.Module) -> Tensor:
    return images(model)


@pytest.mark.parametrize("inside", [0, 1])
def test_the_end_of_an_inner_block_does_not_end_the_outer(model: nn.Module, x: Tensor, inside: int) -> None:
    with tokenprune.record(model) as outer:
        with tokenprune.record(model) as inner:
            for _ in range(inside):
                run(model, x)
        run(model, x)
    run(model, x)
    assert (len(inner.forwards), len(outer.forwards)) == (inside, inside + 1)


def test_a_patch_put_on_inside_the_block_is_recorded_until_its_end(model: nn.Module, x: Tensor) -> None:
    with tokenprune.record(model) as recording:
        run(model, x)
        tokenprune.patch(model, "top_k", schedule={1: 0.5})
        run(model, x)
        with tokenprune.patched(model, "top_k", schedule={2: 0.5}):
            run(model, x)
        tokenprune.unpatch(model)
        run(model, x)
    tokenprune.patch(model, "top_k", keep=0.5)
    run(model, x)
    assert [forward.places[-1].name for forward in recording.forwards[1:]] == ["blocks.1", "blocks.2"]
    with tokenprune.record(model) as recording:
        tokenprune.patch(model, "tome", keep=0.5)
    run(model, x)
    assert recording.forwards == []
