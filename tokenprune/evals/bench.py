"""Speed of a patched model against the same model unpatched, with baselines and conditions in one table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.evals.arms import Arm, Budget, build_arms
from tokenprune.evals.overhead import overhead_cells
from tokenprune.evals.progress import progress
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import Timing, measure, measure_together

GROUP = 14
"""How many arms share two unpatched ones, where many are timed."""


def bench(
    model: nn.Module,
    inputs: Tensor,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 20,
    seed: int = 0,
    baselines: bool = True,
    profile: bool = False,
    show_progress: bool = False,
) -> Table:
    """Times methods at budgets and batch sizes by `tokenprune.evals.throughput.measure`.

    inputs: images [N, C, H, W] on the model's device, repeated to fill a batch. methods: names, None for every one that
    fits the model. budgets: keywords of `tokenprune.patch`, for example [{"flops": 0.6}, {"keep": 0.5}].
    batch_sizes: None for one batch of all inputs. baselines: add random, uniform and a smaller input of equal FLOPs;
    shrinking the pictures is not timed. seed: of the bootstrap. The weights are shared, `model` is left as it is.
    profile: also measure what choosing the tokens costs (`tokenprune.evals.overhead`).

    Columns: `images_per_s` and `unpatched_images_per_s` (medians), `speedup` (median of per-round ratios with a 95%
    bootstrap interval), `control` (unpatched against unpatched), `trusted` (control within 2% of 1), `gmacs` per image
    (1 multiply-add = 2 FLOPs), `flops_ratio`, `promised` (1 / flops_ratio), peak memory in MB where CUDA measures it.
    With `profile` also `overhead`, the share of the unpatched forward's time that scoring, selecting and reducing take
    together, and `score`, `select` and `reduce`.

    Raises TokenPruneError for a named method that is unknown or does not fit, or fewer than 20 rounds.
    """
    arms = build_arms(model, inputs, methods, budgets, baselines=baselines)
    return bench_arms(arms, inputs, batch_sizes, rounds=rounds, seed=seed, profile=profile, show_progress=show_progress)


def bench_arms(
    arms: Sequence[Arm],
    inputs: Tensor,
    batch_sizes: Sequence[int] | None = None,
    *,
    rounds: int = 20,
    seed: int = 0,
    attempts: int = 3,
    profile: bool = False,
    show_progress: bool = False,
) -> Table:
    """The table of `bench` for arms that are built already, the unpatched one first."""
    rows: list[Row] = []
    for batch in batch_sizes if batch_sizes is not None else [len(inputs)]:
        images = inputs[torch.arange(batch, device=inputs.device) % len(inputs)]
        for arm in progress(arms, f"bench, batch {batch}", show=show_progress):
            row = arm_row(arm, arms[0], images, rounds=rounds, seed=seed, attempts=attempts)
            if profile and arm.is_patched and arm.model is not None and arms[0].model is not None:
                row |= overhead_cells(arms[0].model, arm.model, images, rounds=rounds)
            rows.append(row)
    return Table(rows, environment(inputs.device, inputs.dtype))


def bench_together(
    arms: Sequence[Arm],
    inputs: Tensor,
    *,
    rounds: int = 20,
    seed: int = 0,
    group: int = GROUP,
    show_progress: bool = False,
) -> Table:
    """The table of `bench` for arms that are built already, the unpatched one first, timed in groups of `group` arms
    that share their two unpatched ones: a third of the time, in longer rounds, and a group is not tried again. Arms of
    a group that differ by the filter alone, which is not timed, have one time."""
    base, rows = arms[0].model, list[Row]()
    assert base is not None
    control = shared_copy(base)
    for start in progress(range(0, len(arms), group), f"bench, batch {len(inputs)}", show=show_progress):
        some = arms[start : start + group]
        timed = {_forward(arm): (arm, arm.model) for arm in some if arm.model is not None}
        with torch.inference_mode():
            calls = [partial(model, arm.prepare(inputs)) for arm, model in timed.values()]
            found = measure_together(
                [partial(base, inputs), *calls, partial(control, inputs)], rounds, seed=seed, device=inputs.device
            )
        times = dict(zip(timed, found[1:-1], strict=True))
        for arm in some:
            cells: Row = {}
            one = times.get(_forward(arm))
            if one is not None:
                cells = {"images_per_s": len(inputs) / one.seconds, **one.cells()}
            rows.append({**arm_cells(arm, len(inputs)), **cells, "note": arm.note})
    return Table(rows, environment(inputs.device, inputs.dtype))


def _forward(arm: Arm) -> tuple[int, tuple[int, int] | None]:
    """What of an arm is timed."""
    return id(arm.model), arm.size


def time_arm(
    arm: Arm, base: Arm, images: Tensor, *, rounds: int = 20, seed: int = 0, attempts: int = 3
) -> Timing | None:
    """`arm` against `base` and `base` again on `images` [B, C, H, W]; None where the arm has no model."""
    if arm.model is None or base.model is None:
        return None
    # The two unpatched arms are two module trees, as the patched one is: a cost of that would show in the control.
    reference, control, candidate = base.model, shared_copy(base.model), arm.model
    prepared = arm.prepare(images)
    with torch.inference_mode():
        return measure(
            lambda: reference(images),
            lambda: candidate(prepared),
            lambda: control(images),
            rounds=rounds,
            seed=seed,
            attempts=attempts,
            device=images.device,
        )


def timing_cells(timing: Timing, batch: int) -> dict[str, Any]:
    """The cells of a table row that `timing` fills, for batches of `batch` images."""
    return {
        "images_per_s": batch / timing.seconds_patched,
        "unpatched_images_per_s": batch / timing.seconds,
        **ratio_cells(timing),
    }


def ratio_cells(timing: Timing) -> Row:
    """The cells of `timing` but for its times: speed-up, control and peak memory."""
    return {
        **interval_cells("speedup", timing.speedup),
        "control": timing.control,
        "trusted": timing.trusted,
        "peak_mb": _megabytes(timing.peak_memory_patched),
        "unpatched_peak_mb": _megabytes(timing.peak_memory),
    }


def arm_row(arm: Arm, base: Arm, images: Tensor, *, rounds: int = 20, seed: int = 0, attempts: int = 3) -> Row:
    """The row of `bench` for `arm`, timed against the unpatched `base` on images [B, C, H, W]."""
    row = arm_cells(arm, len(images))
    timing = time_arm(arm, base, images, rounds=rounds, seed=seed, attempts=attempts)
    if timing is not None:
        row |= timing_cells(timing, len(images))
    return {**row, "note": arm.note}


def arm_cells(arm: Arm, batch: int) -> Row:
    """What a row of `bench` says of `arm` before it is timed."""
    ratio = arm.flops_ratio
    return {
        "method": arm.method,
        "budget": arm.budget,
        "batch": batch,
        "gmacs": None if arm.flops is None else arm.flops / 1e9,
        "flops_ratio": ratio,
        "tokens": arm.tokens,
        "promised": None if ratio is None else 1.0 / ratio,
    }


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20
