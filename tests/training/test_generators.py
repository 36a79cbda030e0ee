"""States of generators: of several processes, and of a machine with a GPU or without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenprune.training.state import generators, set_generators


def test_generators_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is made up: its generator is set where both have one, and left alone where the state has none."""
    states, given = generators(), list[Tensor]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.ones(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    set_generators(states[:1])
    assert given == []
    both = generators()
    assert len(both) == 2
    set_generators(both)
    assert torch.equal(given[0], torch.ones(16, dtype=torch.uint8))


def test_a_generator_may_be_a_row_of_what_several_processes_have() -> None:
    before = torch.get_rng_state()
    second = torch.Generator().manual_seed(1).get_state()
    try:
        set_generators([torch.stack([before, second])[1]])
        assert torch.equal(torch.get_rng_state(), second)
    finally:
        torch.set_rng_state(before)
