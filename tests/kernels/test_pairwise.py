"""Sums over pairs against the naive loops, whatever the blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_inputs import rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels import inputs as kernel_settings
from tokenprune.kernels import pairwise
from tokenprune.kernels.pairwise import eager, reference

BATCH, COUNT, OTHERS, DIM = 3, 11, 14, 5


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return rows(BATCH, COUNT, DIM).to(dtype), rows(BATCH, OTHERS, DIM, seed=1).to(dtype)


def ranks() -> tuple[Tensor, Tensor]:
    own = torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(2)).argsort(1)
    other = torch.rand(BATCH, OTHERS, generator=torch.Generator().manual_seed(3)).argsort(1)
    return own, other  # one of own is 0: it looks at nothing


def cluster() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(BATCH, COUNT, generator=generator).double()
    return weights, torch.randint(0, 4, (BATCH, COUNT), generator=generator)


def both(name: str, *args: Any, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return tuple(partial(getattr(module, name), *args, **options) for module in (pairwise, reference))  # type: ignore[return-value]


def cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    a, b = inputs()
    found = {f"nearest-{metric}": both("nearest", a, b, metric=metric) for metric in pairwise.METRICS}
    found["nearest-ranked"] = both("nearest", a, b, metric="euclidean", ranks=ranks())
    found["energy"] = both("energy", a, margin=0.2)
    found["neighbours"] = both("neighbours", a, b, threshold=0.1)
    found["density"] = both("density", a, count=4)
    found["density-of-all"] = both("density", a, count=99)
    found["spread"] = both("spread", a, *cluster())
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cached", [1, 2**9, 2**21])
def test_as_in_the_loops(name: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_settings, "CACHED", cached)
    ours, naive = CASES[name]
    torch.testing.assert_close(ours(), naive(), rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lower_row_and_squares_do_not_drown() -> None:
    x = torch.tensor([[[0.0], [1.0], [2.0], [1.0]]]) + 1000.0
    for metric in ("euclidean", "manhattan", "chebyshev"):
        assert pairwise.nearest(x, x[:, 1:], metric=metric)[1].tolist() == [[0, 0, 1, 0]]
    assert pairwise.nearest(x, x[:, 1:], metric="euclidean")[0].tolist() == [[-1, 0, 0, 0]]
    assert pairwise.spread(x, torch.ones(1, 4), torch.zeros(1, 4).long()).tolist() == [[4, 2, 4, 2]]
    assert (pairwise.density(1e4 * rows(2, 9, 4), count=1) == 1).all()  # a token is its own neighbour, at 0


def test_nan_stays_in_its_image_and_batches_of_none() -> None:
    a, b = inputs(torch.float32)
    clean = pairwise.nearest(a, b, metric="euclidean"), pairwise.energy(a, margin=0.5)
    a[1, 3] = float("nan")
    (value, row), energy = pairwise.nearest(a, b, metric="euclidean"), pairwise.energy(a, margin=0.5)
    assert value[1, 3].isnan()
    assert ((row >= 0) & (row < OTHERS)).all()
    assert energy[1].isnan().all()
    for got, expected in ((value, clean[0][0]), (row, clean[0][1]), (energy, clean[1])):
        assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert pairwise.nearest(a[:0], b[:0], metric="dot")[1].shape == (0, COUNT)
    assert pairwise.nearest(a[:, :0], b, metric="dot")[1].shape == (BATCH, 0)
    assert pairwise.density(a[:0], count=3).shape == (0, COUNT)


@pytest.mark.parametrize("name", ["nearest-ranked", "neighbours", "spread"])
def test_one_node_of_a_graph_and_the_same_exported(name: str) -> None:
    ours = CASES[name][0]
    expected, (given, options) = ours(), (ours.args, ours.keywords)

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return ours.func(*tensors, **options)

    compiled = torch.compile(Call(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), expected)
    exported = torch.export.export(Call(), given)
    assert not any("tokenprune" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*given), expected)


def test_products_count_and_the_meta_device_runs() -> None:
    a, b = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        pairwise.nearest(a, b, metric="manhattan")
        pairwise.spread(a, *cluster())
    assert counter.get_total_flops() == 2 * BATCH * COUNT * DIM * (OTHERS + COUNT)
    value, row = pairwise.nearest(a.to("meta"), b.to("meta"), metric="cosine")
    assert (value.shape, row.dtype) == ((BATCH, COUNT), torch.long)


def test_half_precision_gives_float32() -> None:
    a, b = inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = pairwise.nearest(a, b, metric="cosine")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, pairwise.nearest(a.float(), b.float(), metric="cosine")[0])


def test_what_is_refused() -> None:
    a, b = inputs()
    with pytest.raises(TokenPruneError, match="is none of cosine"):
        pairwise.nearest(a, b, metric="hamming")
    for wrong in (b[:, :0], b[:2], b[:, :, :3]):
        with pytest.raises(TokenPruneError, match="do not fit"):
            pairwise.neighbours(a, wrong, threshold=0.5)


def test_the_limit_is_kept_and_rows_do_not_depend_on_it() -> None:
    x, largest = rows(2, 300, 8), 0

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.bmm.default:
                largest = max(largest, 4 * out.numel())
            return out

    whole = pairwise.density(x, count=5), pairwise.energy(x, margin=0.5)
    for limit in (2**14, 2**17):
        largest = 0
        with Products():  # of which none would be seen inside of the operator
            parts = eager.density(x, 5, limit), eager.energy(x, 0.5, limit)
        assert limit / 4 < largest <= limit
        for got, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
