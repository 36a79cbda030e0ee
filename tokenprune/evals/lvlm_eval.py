"""What pruning costs a vision-language model: what it still names, what it still finds, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import UNPATCHED, Budget
from tokenprune.evals.digits_lvlm import (
    VISUAL_TOKENS,
    names,
    place_answer,
    prompts,
    to_model,
    token,
    what_is_there,
    where_is,
)
from tokenprune.evals.lvlm_arms import LvlmArm, lvlm_arms
from tokenprune.evals.lvlm_bench import time_answers
from tokenprune.evals.lvlm_speed import cache_bytes
from tokenprune.evals.placed_digits import GRID, placed_digits
from tokenprune.evals.progress import progress
from tokenprune.evals.random_llava import generate
from tokenprune.evals.ranks import ranks
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells

SERIES = 3
TIMED_BATCH = 8


@dataclass(frozen=True)
class Questions:
    """images: [N, 3, 64, 64]; of each the question "what is ?" and one "where is three" about one of its digits, ids
    [N, 3], with answers [N, 3] and [N, 2]."""

    images: Tensor
    what: Tensor
    digits: Tensor
    where: Tensor
    places: Tensor

    def first(self, count: int) -> Questions:
        """The first `count` images with theirs."""
        return next(self.batches(count))

    def batches(self, size: int) -> Iterator[Questions]:
        """`size` images at a time with theirs."""
        parts = (self.images, self.what, self.digits, self.where, self.places)
        for start in range(0, len(self.images), size):
            yield Questions(*(part[start : start + size] for part in parts))


@dataclass(frozen=True)
class Answers:
    """Of each picture [N]: the share of its digits that are named, whether the one asked for is found, and the mean
    vertical position (0 the top, 1 the bottom) of the visual tokens kept for "where", None for the unpatched model.
    cache_bytes: of a prompt."""

    recognised: Tensor
    localised: Tensor
    vertical: Tensor | None
    cache_bytes: float


def draw_questions(count: int, seed: int = 0) -> Questions:
    """About `count` test pictures, those of SERIES series that begin with `seed`, in equal parts."""
    parts = []
    for series in range(SERIES):
        share = (count + SERIES - 1 - series) // SERIES
        if share:
            scenes = placed_digits("test", share, seed + series)
            digits, rows, columns = map(torch.from_numpy, (scenes.digits, scenes.rows, scenes.columns))
            parts.append(
                (
                    to_model(scenes),
                    what_is_there(share),
                    names(digits)[:, :-1],
                    where_is(digits[:, 0]),
                    place_answer(rows[:, 0], columns[:, 0])[:, :-1],
                )
            )
    return Questions(*(torch.cat(part) for part in zip(*parts, strict=True)))


def evaluate_lvlm(
    model: nn.Module,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"keep": 0.25},),
    *,
    samples: int = 75,
    batch_size: int = 50,
    seed: int = 0,
    baselines: bool = True,
    rounds: int | None = None,
    show_progress: bool = False,
) -> Table:
    """Asks two questions about each of `samples` pictures, with every method at every budget.

    methods, budgets, baselines: as in `lvlm_arms`. rounds: of timing, unpatched and patched interleaved; None for none.

    Columns: `tokens`, visual tokens of an image behind the last place, and their `share`; `flops_ratio`, of the whole
    prefill, image tower and scoring counted; `recognition`, the share of a picture's digits that are named, and
    `localisation`, row and column of a digit, both right; `recognition_drop` and `localisation_drop`, against the
    unpatched model, paired; `vertical`, where the kept tokens lie on average, 0 the top and 1 the bottom; all with 95%
    bootstrap intervals over pictures; `cache_bytes`, of keys and values of a prompt, measured; with `rounds` the
    columns of `time_answers`.

    In several processes each of which calls this alike, batches are shared out, and all get the table that one gives.

    Raises TokenPruneError for a named method that is unknown or does not fit, for `rounds` in several processes, and
    where another of these has died.
    """
    if samples < 1:
        raise TokenPruneError(f"samples={samples}: ask about at least one picture")
    with ranks() as processes:
        processes.refuse_timing(rounds)
        questions = draw_questions(samples, seed)
        example = _inputs(questions.first(2), questions.where)
        arms = lvlm_arms(model, example, methods, budgets, baselines=baselines)
        batches = processes.own(list(questions.batches(batch_size)))
        bar = progress(arms, "answers", show=show_progress and processes.is_main)
        given = [[_answers(arm, batch) for batch in batches] for arm in bar]
        caches = [cache_bytes_of(arm, questions.first(batch_size)) for arm in arms]
        times: list[Row] = [{} for _ in arms]
        if rounds is not None:
            times = time_answers(arms, example_batch(questions), rounds=rounds, seed=seed, show_progress=show_progress)

        def table(parts: list[list[_Batch | None]]) -> Table:
            found = [_joined([part[arm] for part in parts], cache) for arm, cache in enumerate(caches)]
            assert found[0] is not None
            rows = [
                {**_row(arm, one, found[0], seed), **timed, "note": arm.note}
                for arm, one, timed in zip(arms, found, times, strict=True)
            ]
            conditions: Row = {"pictures": samples, "questions": 2 * samples}
            return Table(rows, conditions | processes.conditions() | environment())

        return processes.joined([list(batch) for batch in zip(*given, strict=True)], table)


def example_batch(questions: Questions, count: int = TIMED_BATCH) -> dict[str, Tensor]:
    """The arguments of a forward on "where" of the first `count` pictures."""
    first = questions.first(count)
    return _inputs(first, first.where)


def answer(arm: LvlmArm, questions: Questions, *, batch_size: int = 50) -> Answers | None:
    """What the arm's model answers, greedily; None where it could not be built."""
    given = [_answers(arm, batch) for batch in questions.batches(batch_size)]
    return _joined(given, cache_bytes_of(arm, questions.first(batch_size)))


def cache_bytes_of(arm: LvlmArm, questions: Questions) -> float | None:
    """Of keys and values of a prompt in the arm's model, None where it could not be built."""
    if arm.model is None:
        return None
    return cache_bytes(arm.model, _inputs(questions, questions.where)) / len(questions.images)


@dataclass(frozen=True)
class _Batch:
    """`Answers` but for the cache's bytes."""

    recognised: Tensor
    localised: Tensor
    vertical: Tensor | None


def _answers(arm: LvlmArm, part: Questions) -> _Batch | None:
    if arm.model is None:
        return None
    ids = generated(arm.model, _inputs(part, part.what), part.digits.shape[1])
    recognised = (part.digits.unsqueeze(2) == ids.unsqueeze(1)).any(2).double().mean(1)
    vertical = None
    if arm.is_patched:
        with tokenprune.record(arm.model) as recording:
            ids = generated(arm.model, _inputs(part, part.where), 2)
        kept = [row for forward in recording.forwards for row in forward.places[-1].kept]
        vertical = torch.stack([(row // GRID + 0.5).mean() / GRID for row in kept]).double()
    else:
        ids = generated(arm.model, _inputs(part, part.where), 2)
    return _Batch(recognised, (ids == part.places).all(1).double(), vertical)


def _joined(parts: Sequence[_Batch | None], cache: float | None) -> Answers | None:
    given = [part for part in parts if part is not None]
    if not given or cache is None:
        return None
    vertical = [part.vertical for part in given if part.vertical is not None]
    return Answers(
        torch.cat([part.recognised for part in given]),
        torch.cat([part.localised for part in given]),
        torch.cat(vertical) if vertical else None,
        cache,
    )


@torch.inference_mode()
def generated(model: Any, inputs: Mapping[str, Tensor], words: int) -> Tensor:
    """The greedy answer [B, words], padded where it ended before."""
    ids = generate(model, inputs, words).sequences[:, inputs["input_ids"].shape[1] :]
    return torch.nn.functional.pad(ids, (0, words - ids.shape[1]), value=token("<pad>"))


def _inputs(questions: Questions, asked: Tensor) -> dict[str, Tensor]:
    ids = prompts(asked[: len(questions.images)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": questions.images}


def _row(arm: LvlmArm, found: Answers | None, base: Answers, seed: int) -> Row:
    tokens = VISUAL_TOKENS if arm.method == UNPATCHED else arm.tokens
    row: Row = {
        "method": arm.method,
        "budget": arm.budget,
        "positions": arm.positions,
        "tokens": tokens,
        "share": None if tokens is None else tokens / VISUAL_TOKENS,
        "flops_ratio": arm.flops_ratio,
    }
    if found is None:
        return row
    row |= _mean("recognition", found.recognised, (0.0, 1.0), seed)
    row |= _mean("localisation", found.localised, (0.0, 1.0), seed)
    if found is not base:
        row |= _mean("recognition_drop", base.recognised - found.recognised, (-1.0, 1.0), seed)
        row |= _mean("localisation_drop", base.localised - found.localised, (-1.0, 1.0), seed)
    if found.vertical is not None:
        row |= _mean("vertical", found.vertical, (0.0, 1.0), seed)
    return {**row, "cache_bytes": round(found.cache_bytes)}


def _mean(name: str, values: Tensor, support: tuple[float, float], seed: int) -> Row:
    found = bootstrap_mean(values, support=support, seed=seed)
    return interval_cells(name, found)
