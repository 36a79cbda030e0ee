"""The latency table of a model on this device: what `tokenprune bench --save-profile` measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import BudgetError, TokenPruneError
from tokenprune.evals.latency_grid import fewer_tokens, relative_latency
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import environment
from tokenprune.evals.throughput import CONTROL_TOLERANCE
from tokenprune.family import active_patches
from tokenprune.latency import LatencyRow, LatencyTable
from tokenprune.windows.patch import WindowsPatch

STEPS = 8


def profile_latency(
    model: nn.Module,
    inputs: Tensor,
    methods: Sequence[str],
    budget: Mapping[str, Any],
    *,
    batch_sizes: Sequence[int],
    rounds: int = 20,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Time `model`, with tokens removed at random in its first block (of a model of windows, with windows left out at
    random in all) and patched with each of `methods` at `budget`; `model` itself is left as it is.

    inputs: [N, C, H, W], repeated to fill a batch. The first give the time of fewer multiply-adds, the others by how
    much each of a method's places lasts longer than its multiply-adds say. All are timed in turn, `rounds` times.

    Raises:
        TokenPruneError: none of the methods can be run at that budget.
    """
    base = tokenprune.unpatch(shared_copy(model)).eval()
    whole = tokenprune.patch(shared_copy(base), "random", keep=1.0)
    tokens = tokenprune.report(whole).to_dict()["tokens"]
    if any(isinstance(patch, WindowsPatch) for patch in active_patches(whole).values()):
        curve = [base, *_fewer_windows(base, seed)]
    else:
        curve = fewer_tokens(base, range(tokens, 1, -max(1, tokens // STEPS)), seed)
    patched = _patched(base, methods, budget)
    models = [*curve, *patched.values()]
    rows, steady = [], True
    for batch in batch_sizes:
        images = inputs[torch.arange(batch, device=inputs.device) % len(inputs)]
        with torch.inference_mode():
            latency, control = relative_latency(models, images, rounds, seed=seed, clock=clock)
        steady &= abs(control - 1.0) <= CONTROL_TOLERANCE
        flops = [1.0, *(tokenprune.report(one).to_dict()["flops_ratio"] for one in curve[1:])]
        row = LatencyRow(batch, tokens, tuple(flops), latency[: len(curve)], {})
        overhead = {}
        for (name, one), share in zip(patched.items(), latency[len(curve) :], strict=True):
            report = tokenprune.report(one).to_dict()
            overhead[name] = (share - row.of_flops(report["flops_ratio"])) / len(report["places"])
        rows.append(LatencyRow(batch, tokens, row.flops, row.latency, overhead))
    measured = {**environment(inputs.device, inputs.dtype), "rounds": rounds, "trusted": steady}
    return LatencyTable(tuple(rows), measured)


def _fewer_windows(base: nn.Module, seed: int) -> list[nn.Module]:
    """Copies that compute so many STEPS-th of their windows, where that is fewer than all."""
    made = []
    for step in range(STEPS - 1, 0, -1):
        with suppress(BudgetError):
            made.append(tokenprune.patch(shared_copy(base), "random", keep=step / STEPS, seed=seed))
    return made


def _patched(base: nn.Module, methods: Sequence[str], budget: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The methods that can be run at the budget."""
    made, refused = {}, []
    for name in methods:
        try:
            made[name] = tokenprune.patch(shared_copy(base), name, **budget)
        except TokenPruneError as error:
            refused.append(str(error))
    if not made:
        raise TokenPruneError("no method can be profiled: " + "; ".join(refused))
    return made
