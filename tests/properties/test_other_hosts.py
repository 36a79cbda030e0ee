"""The contract over drawn sizes, budgets and methods: windows, transformers' towers and denoisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import denoisers_zoo
import hf_families
import torch
import windows_zoo
from families import run
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tokenprune import BudgetError, UnsupportedMethod

SHARES = st.floats(0.02, 1.0)
BATCHES = st.integers(1, 3)
TOWERS = sorted(hf_families.TOWERS)
PATCHES = math.prod(hf_families.GRID)
DENOISERS = ("dit", "flux", "pixart", "sd3", "unet_sd", "unet_sdxl")
tower, denoiser = cache(hf_families.build), cache(denoisers_zoo.build)


def holds(
    model: nn.Module,
    call: Callable[[], dict[str, Tensor]],
    method: str,
    budget: dict[str, Any],
    options: Any = None,
    tokens: int | None = None,
) -> None:
    """A budget of 1.0 changes no bit, any other the shape of no output, is met within 1%, or to the token where
    `tokens` enter, or refused, and behind `unpatch` or a refusal the model is as it was."""
    tokenprune.unpatch(model)  # of an example that has failed
    plain = call()
    tokenprune.patch(model, method, keep=1.0)
    same(call(), plain)
    tokenprune.unpatch(model)
    try:
        tokenprune.patch(model, method, **budget, **(options or {}))
        reduced = call()
    except (BudgetError, UnsupportedMethod) as error:
        note(str(error))
    else:
        assert {name: (x.shape, x.dtype) for name, x in reduced.items()} == {
            name: (x.shape, x.dtype) for name, x in plain.items()
        }
        assert all(x.isfinite().all() for x in reduced.values())
        report = tokenprune.report(model).to_dict()
        if "flops" in budget:
            assert abs(report["flops_ratio"] - budget["flops"]) <= 0.01
        if tokens is not None and "keep" in budget and report["places"]:
            assert report["places"][-1]["tokens_out"] == max(1, math.ceil(budget["keep"] * tokens - 1e-6))
    tokenprune.unpatch(model)
    same(call(), plain)


def same(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert outputs.keys() == expected.keys()
    assert all(torch.equal(outputs[name], expected[name]) for name in expected)


@given(
    name=st.sampled_from(["v1", "v2"]),
    size=st.tuples(st.integers(12, 24), st.integers(12, 24)),
    batch=BATCHES,
    kind=st.sampled_from(["keep", "flops"]),
    share=SHARES,
)
def test_windows(name: str, size: tuple[int, int], batch: int, kind: str, share: float) -> None:
    height, width = (2 * side for side in size)
    model, x = windows_zoo.build(name, (height, width)), windows_zoo.images((height, width), batch)
    holds(model, lambda: {"logits": run(model, x)}, "sparsevit", {kind: share})


@given(
    name=st.sampled_from(TOWERS),
    method=st.sampled_from(["top_k", "tome", "zero_tprune", "pitome", "k_medoids"]),
    batch=BATCHES,
    kind=st.sampled_from(["keep", "flops"]),
    share=SHARES,
)
def test_towers_of_transformers(name: str, method: str, batch: int, kind: str, share: float) -> None:
    model, x = tower(name), hf_families.images(batch)
    holds(model, lambda: hf_families.tensors(hf_families.call(model, x)), method, {kind: share}, tokens=PATCHES)


@given(
    name=st.sampled_from(DENOISERS),
    method=st.sampled_from(["tomesd", "random", "at_edm", "todo", "toma"]),
    size=st.tuples(st.sampled_from([8, 12, 16]), st.sampled_from([8, 12, 16])),
    batch=BATCHES,
    kind=st.sampled_from(["keep", "flops"]),
    share=SHARES,
)
def test_denoisers(name: str, method: str, size: tuple[int, int], batch: int, kind: str, share: float) -> None:
    model, inputs = denoiser(name)
    x = inputs(batch, *size)
    holds(model, lambda: {"sample": denoisers_zoo.run(model, x)}, method, {kind: share}, {"steps": {}})
