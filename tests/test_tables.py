"""Tables that are held: what may be held, for whom, and for how long."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune import tables
from tokenprune.restore import placed
from tokenprune.state import TokenState
from tokenprune.tables import positions, table


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(tables, "_HELD", {})


def test_a_table_is_made_once_for_each_key_device_and_maker():
    x = torch.zeros(2)
    first = positions(7, x)
    assert torch.equal(first, torch.arange(7))
    assert positions(7, x) is first
    assert torch.equal(positions(8, x), torch.arange(8))
    assert torch.equal(table(lambda count, device: torch.ones(count, device=device), 7, like=x), torch.ones(7))
    assert positions(7, x.to("meta")).is_meta
    assert positions(7, x) is first


def test_what_is_made_in_inference_mode_is_differentiated_through_later():
    with torch.inference_mode():
        held = positions(4, torch.zeros(1))
    weight = torch.ones(4, requires_grad=True)
    (held * weight).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2, 3]


def test_fake_and_transformed_tensors_are_not_held():
    with FakeTensorMode() as mode:
        positions(5, mode.from_tensor(torch.zeros(1)))
        positions(5, torch.zeros(1))
    torch.func.grad(lambda x: (positions(5, x) * x).sum())(torch.zeros(5))
    torch.func.vmap(lambda x: positions(5, x) * x)(torch.zeros(2, 5))
    assert all(type(held) is torch.Tensor for held in tables._HELD.values())
    assert positions(5, torch.zeros(1)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
def test_a_trace_leaves_nothing_behind():
    """Its sizes are tensors, by which no table would be found again."""
    traced = torch.jit.trace(lambda x: x + positions(x.shape[0], x), torch.zeros(5), check_trace=False)
    assert not tables._HELD
    assert traced(torch.zeros(7)).tolist() == list(range(7))


def test_of_many_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(tables, "MOST", 3)
    x = torch.zeros(1)
    threads = [threading.Thread(target=lambda: [positions(count, x) for count in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables._HELD) <= 3
    assert positions(19, x).tolist() == list(range(19))


def test_places_follow_the_dtype_that_numbers_have_by_default():
    state, x = TokenState(6, 6, grid=(2, 3)), torch.zeros(1, 6, 2, dtype=torch.float64)
    single = placed(x, state)
    try:
        torch.set_default_dtype(torch.float64)
        double = placed(x, state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-6)
