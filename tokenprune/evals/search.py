"""Schedules found for a model: which share of the tokens leaves which block, by search on a few unlabelled images.

At random as in Zero-TPrune (Wang et al., CVPR 2024), or by evolution as in SparseViT (Chen et al., CVPR 2023), without
gradients or labels: a schedule is as good as the patched model agrees with the unpatched one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tokenprune.budget import checked_count, is_number
from tokenprune.calibration import checked_images
from tokenprune.errors import BudgetError
from tokenprune.evals.ranks import ranks
from tokenprune.evals.resumable import run
from tokenprune.evals.searching import Goal, Search
from tokenprune.stored_schedule import StoredSchedule

CANDIDATES = 200


def search(
    model: nn.Module,
    images: Tensor,
    method: str,
    *,
    flops: float | None = None,
    speedup: float | None = None,
    min_agreement: float | None = None,
    strategy: Literal["evolution", "monte_carlo"] = "evolution",
    candidates: int = CANDIDATES,
    batch_size: int = 8,
    seed: int = 0,
    restore: str | None = None,
    output: str | Path | None = None,
    show_every: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> StoredSchedule:
    """Find at which blocks, and how strongly at each, `method` reduces `model` best; `model` is left as it is.

    images: [N, C, H, W] on the model's device, without labels; 64 are enough for a small model. One goal:

    flops: share in (0, 1) of the multiply-adds, met within 1%, at which the schedule of highest agreement is taken.
    speedup: at least so many times the unpatched model's speed on this device, of which again the one of highest
    agreement.
    min_agreement: share in (0, 1] of the images on which the answer stays, at which the fastest is taken.

    Agreement is that of the top-1 class, between equal ones the cosine of the features decides; of a model without
    classes it is that cosine. Time is measured on batches of `batch_size` images, once more and by the full protocol
    for what is returned.

    strategy: "evolution" draws the first 40 candidates at random and then mutates and crosses the best; "monte_carlo"
    draws all. The first candidate is the method's own schedule at that budget, so that what is found is never worse on
    these images. seed: of what is drawn. restore: as `patch` takes it. output: a folder for the state after each
    candidate: a search that was killed goes on from there. show_every: candidates after which a line is printed.
    options: of the method.

    In several processes (torchrun, `accelerate launch`) each of which calls this alike, the images are shared out, and
    all of them find what one process finds; rank 0 takes the times, and keeps the state.

    Raises:
        UnsupportedMethod, UnsupportedModel: what is known of them does not allow a search; it is of image towers.
        BudgetError: not exactly one goal, none of the candidates meets it, or an option says what is to be found.
        TokenPruneError: images are none, `output` holds another search or a state that cannot be read, or another
            process has died.
    """
    goal = _goal(flops=flops, speedup=speedup, min_agreement=min_agreement)
    if strategy not in ("evolution", "monte_carlo"):
        raise BudgetError(f"strategy={strategy!r} is 'evolution' or 'monte_carlo'")
    for name, count, example in (("candidates", candidates, CANDIDATES), ("batch_size", batch_size, 8)):
        checked_count(name, count, smallest=1, example=example)
    checked_count("seed", seed, smallest=0, example=0)
    with ranks() as processes:
        found = Search(
            model,
            checked_images(images),
            method,
            options,
            goal,
            evolves=strategy == "evolution",
            batch_size=batch_size,
            seed=seed,
            restore=restore,
            clock=clock,
            processes=processes,
        )
        if output is None:
            while found.step < candidates:
                found.advance()
        else:
            run(found, Path(output), candidates, show_every=show_every, save_every=1, processes=processes)
        return found.result()


def _goal(**goals: float | None) -> Goal:
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise BudgetError(f"a search has one goal of {', '.join(goals)}, got {given or 'none'}; for example flops=0.6")
    [(name, value)] = given.items()
    possible = is_number(value) and (
        value > 1.0 if name == "speedup" else 0.0 < value < 1.0 or (name == "min_agreement" and value == 1.0)
    )
    if not possible:
        raise BudgetError(
            f"{name}={value!r} cannot be a goal: flops is a share in (0, 1), min_agreement one in (0, 1], speedup more"
            " than 1"
        )
    return Goal(name, float(value))
