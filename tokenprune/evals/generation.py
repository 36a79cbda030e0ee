"""What pruning costs a diffusion model: distance to real pictures, class accuracy, and distance to its own pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Budget
from tokenprune.evals.digit_reader import DigitReader, digit_reader, read
from tokenprune.evals.digits_pipelines import GUIDANCE, STEPS, DigitsPipeline
from tokenprune.evals.drawing_orders import Orders, drawing_orders
from tokenprune.evals.drawn_digits import PIXEL_MEAN, PIXEL_STD, drawn_digit_pictures, to_model
from tokenprune.evals.frechet import Gaussian, bootstrap_frechet, gaussian, interval
from tokenprune.evals.generation_arms import GenerationArm, equal_time, generation_arms
from tokenprune.evals.generation_bench import time_generation, timing_cells_of
from tokenprune.evals.progress import progress
from tokenprune.evals.ranks import ranks
from tokenprune.evals.saliency import feature_cosine
from tokenprune.evals.stats import Interval, bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import Timing

REAL_IMAGES = 4000
# What rounding to eight bits alone gives: pictures that are closer than that are equal for the eye.
ROUNDING_ERROR = 1 / 255**2 / 12


def evaluate_generation(
    pipe: DigitsPipeline,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    samples: int = 1000,
    batch_size: int = 50,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    baselines: bool = True,
    rounds: int | None = None,
    show_progress: bool = False,
) -> Table:
    """Draws `samples` pictures, all classes in turn, with every method at every budget from the same noise.

    methods, budgets, baselines: as in `generation_arms`. rounds: of `bench_generation`, whose columns are added; each
    patched row is then followed by a run of fewer steps of equal time. None for no timing.

    Columns: `frechet`, the distance to pictures of the test scans in the features of the shipped reader, and
    `frechet_rise`, that above the unpatched model's; `accuracy`, the share of pictures that the reader takes for the
    digit that was asked for, and `accuracy_drop`; `psnr` in dB and `cosine` of the reader's features, both to the
    unpatched picture of the same seed, where a picture that equals it within the rounding of eight bits counts as
    58.9 dB. All with 95% bootstrap intervals over seeds, those of rise and drop paired.

    In several processes each of which calls this alike, batches are shared out, and all get the table that one gives.

    Raises TokenPruneError for fewer than two samples, for a named method that is unknown or does not fit, for `rounds`
    in several processes, and where another of these has died.
    """
    with ranks() as processes:
        processes.refuse_timing(rounds)
        orders = drawing_orders(samples, seed)
        arms = generation_arms(
            pipe, orders.first(2), methods, budgets, steps=steps, guidance=guidance, baselines=baselines
        )
        timings: list[Timing | None] = [None] * len(arms)
        if rounds is not None:
            timed = partial(time_generation, rounds=rounds, seed=seed, show_progress=show_progress)
            timings = timed(arms, arms[0], orders)
            extra = equal_time(arms, [one.speedup if one else None for one in timings]) if baselines else []
            timings, arms = timings + timed(extra, arms[0], orders), arms + extra
        own, show = processes.own(list(orders.batches(batch_size))), show_progress and processes.is_main
        drawn = [draw(arm, own, show_progress=show) for arm in arms]

        def table(parts: list[list[Tensor | None]]) -> Table:
            drawings = [together([part[arm] for part in parts]) for arm in range(len(arms))]
            rows = score_drawings(arms, drawings, orders.labels, real_features(), seed=seed)
            for row, timing in zip(rows, timings, strict=True):
                row.update(timing_cells_of(timing))
                row["note"] = row.pop("note")  # the last column
            conditions: Row = {"images": samples, "steps": steps, "guidance": guidance, "real images": REAL_IMAGES}
            return Table(rows, conditions | processes.conditions() | environment())

        return processes.joined([list(batch) for batch in zip(*drawn, strict=True)], table)


def draw(arm: GenerationArm, batches: Sequence[Orders], *, show_progress: bool = False) -> list[Tensor | None]:
    """The arm's pictures [B, 3, 36, 36] in [0, 1] of each batch, None where it could not be built."""
    if arm.pipe is None:
        return [None] * len(batches)
    bar = progress(batches, f"{arm.method} {arm.budget}".strip(), show=show_progress)
    return [arm.draw(batch).float().cpu() for batch in bar]


def together(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The pictures of all batches, None where they were not drawn."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def real_features(count: int | None = None, reader: DigitReader | None = None) -> Gaussian:
    """Of `count` (REAL_IMAGES) pictures drawn with the test scans, in the features of the reader (the shipped one)."""
    pictures, _, _ = drawn_digit_pictures("test", REAL_IMAGES if count is None else count)
    return gaussian(read(reader or digit_reader(), to_model(pictures))[0])


@dataclass(frozen=True)
class Scores:
    """Per picture: itself [N, 3, S, S], the reader's features [N, D] and whether it is right [N]. distance: Fréchet;
    draws: resampled distances [resamples], paired over all that are scored with the same seed."""

    pictures: Tensor
    features: Tensor
    right: Tensor
    distance: Interval
    draws: Tensor


def score(pictures: Tensor, labels: Tensor, reader: DigitReader, real: Gaussian, *, seed: int = 0) -> Scores:
    """What the reader finds in `pictures` [N, 3, S, S] in [0, 1] of `labels` [N]; real: `real_features`.

    Raises TokenPruneError for fewer than two pictures.
    """
    if len(pictures) < 2:
        raise TokenPruneError(f"{len(pictures)} picture has no covariance; ask for at least two samples")
    features, digits = read(reader, (pictures - PIXEL_MEAN) / PIXEL_STD)
    distance, draws = bootstrap_frechet(features, real, seed=seed)
    return Scores(pictures, features, (digits == labels).double(), distance, draws)


def quality_cells(scores: Scores, base: Scores | None, *, seed: int = 0) -> Row:
    """The quality columns of `evaluate_generation`; base: of the unpatched pictures, None where these are they."""
    found = scores.distance
    row: Row = interval_cells("frechet", found)
    row |= _mean("accuracy", scores.right, (0.0, 1.0), seed)
    if base is not None:
        rise = interval(found.estimate - base.distance.estimate, scores.draws - base.draws)
        row |= interval_cells("frechet_rise", rise)
        row |= _mean("accuracy_drop", base.right - scores.right, (-1.0, 1.0), seed)
        row |= _mean("psnr", psnr(scores.pictures, base.pictures), None, seed)
        row |= _mean("cosine", feature_cosine(scores.features, base.features), None, seed)
    return row


def arm_cells(arm: GenerationArm) -> Row:
    """What `arm` is and what it costs."""
    return {
        "method": arm.method,
        "budget": arm.budget,
        "steps": arm.steps,
        "gmacs": None if arm.flops is None else arm.flops / 1e9,
        "flops_ratio": arm.flops_ratio,
        "tokens": arm.tokens,
    }


def score_drawings(
    arms: Sequence[GenerationArm], drawings: Sequence[Tensor | None], labels: Tensor, real: Gaussian, *, seed: int = 0
) -> list[Row]:
    """A row for each arm, with the quality columns of `evaluate_generation`; the first arm is the unpatched one."""
    reader, rows, base = digit_reader(), list[Row](), None
    for arm, pictures in zip(arms, drawings, strict=True):
        row = arm_cells(arm)
        if pictures is not None:
            scores = score(pictures, labels, reader, real, seed=seed)
            row |= quality_cells(scores, base, seed=seed)
            base = base or scores
        rows.append({**row, "note": arm.note})
    return rows


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of pictures [N, C, H, W] in [0, 1]; at most 58.9, see ROUNDING_ERROR."""
    error = (pictures - reference).double().square().mean(dim=(1, 2, 3))
    return -10 * error.clamp(min=ROUNDING_ERROR).log10()


def _mean(name: str, values: Tensor, support: tuple[float, float] | None, seed: int) -> Row:
    found = bootstrap_mean(values, support=support, seed=seed)
    return interval_cells(name, found)
