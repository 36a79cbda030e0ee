"""Speed of whole runs of a diffusion model, patched and unpatched interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tokenprune.evals.arms import Budget
from tokenprune.evals.bench import timing_cells
from tokenprune.evals.digits_pipelines import GUIDANCE, STEPS, DigitsPipeline, pipeline_of
from tokenprune.evals.drawing_orders import Orders, drawing_orders
from tokenprune.evals.generation_arms import GenerationArm, generation_arms
from tokenprune.evals.progress import progress
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import Relative, Timing, measure, measure_together

TIMED_BATCH = 4


def bench_generation(
    pipe: DigitsPipeline,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    rounds: int = 20,
    seed: int = 0,
    baselines: bool = True,
    show_progress: bool = False,
) -> Table:
    """Times whole runs of `steps` steps as `bench` times forwards: its columns, images per second of whole pictures."""
    orders = drawing_orders(TIMED_BATCH, seed)
    arms = generation_arms(pipe, orders, methods, budgets, steps=steps, guidance=guidance, baselines=baselines)
    timings = time_generation(arms, arms[0], orders, rounds=rounds, seed=seed, show_progress=show_progress)
    rows: list[Row] = []
    for arm, timing in zip(arms, timings, strict=True):
        row: Row = {"method": arm.method, "budget": arm.budget, "steps": arm.steps, "flops_ratio": arm.flops_ratio}
        row["promised"] = None if arm.flops_ratio is None else 1 / arm.flops_ratio
        rows.append({**row, **timing_cells_of(timing), "note": arm.note})
    return Table(rows, {"batch": TIMED_BATCH, "steps": steps, "guidance": guidance, **environment()})


def time_generation(
    arms: Sequence[GenerationArm],
    base: GenerationArm,
    orders: Orders,
    *,
    rounds: int = 20,
    seed: int = 0,
    attempts: int = 1,
    show_progress: bool = False,
) -> list[Timing | None]:
    """Each arm against the unpatched `base` and a second unpatched one, on the first TIMED_BATCH orders."""
    orders = orders.first(TIMED_BATCH)
    assert base.model is not None
    second = pipeline_of(shared_copy(base.model))
    control = replace(base, pipe=second, model=second.denoiser)
    timings: list[Timing | None] = []
    for arm in progress(arms, "bench", show=show_progress):
        if arm.pipe is None:
            timings.append(None)
            continue
        timings.append(
            measure(
                lambda: base.draw(orders),
                lambda arm=arm: arm.draw(orders),  # type: ignore[misc]
                lambda: control.draw(orders),
                rounds=rounds,
                seed=seed,
                attempts=attempts,
            )
        )
    return timings


def time_together(
    arms: Sequence[GenerationArm], orders: Orders, *, rounds: int = 20, seed: int = 0
) -> list[Relative | None]:
    """Whole runs on `orders` of all arms in turn, the first one being the unpatched, which runs again as the last; None
    for an arm that could not be built."""
    base = arms[0]
    assert base.model is not None
    second = pipeline_of(shared_copy(base.model))
    timed = [arm for arm in arms if arm.pipe is not None]
    calls = [partial(arm.draw, orders) for arm in (*timed, replace(base, pipe=second, model=second.denoiser))]
    found = dict(zip(map(id, timed), measure_together(calls, rounds, seed=seed)[:-1], strict=True))
    return [found.get(id(arm)) for arm in arms]


def timing_cells_of(timing: Timing | None) -> Row:
    """The cells of a row that was timed, none of one that was not."""
    return {} if timing is None else timing_cells(timing, TIMED_BATCH)
