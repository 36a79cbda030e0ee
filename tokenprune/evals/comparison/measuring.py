"""The rows of a comparison: quality and speed of every method at a budget, kept as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

import tokenprune
from tokenprune.errors import MALFORMED, TokenPruneError
from tokenprune.evals.accuracy import compare, run_unpatched
from tokenprune.evals.accuracy_rows import UnpatchedBatch
from tokenprune.evals.arms import SMALLER_INPUT, Arm, Budget, budget_label, build_arms, comparable, filtered
from tokenprune.evals.bench import bench_together
from tokenprune.evals.calibrated_arms import Calibrated
from tokenprune.evals.commands import first_images
from tokenprune.evals.data import ImageData
from tokenprune.evals.models import LoadedModel
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.smaller_input import FILTERS
from tokenprune.evals.table import Row, Table

ENDS = ("", "_low", "_high")
CALIBRATED_ON = 64
TIMED = ("speedup", "promised", "control", "trusted", "images_per_s")


def join(quality: Table, speed: Table, names: Sequence[str] | None = None) -> Table:
    """One row a method and budget, out of a table of `evaluate` and one of `bench` at one batch size: what identifies
    it, its quality and its cost (`names`: these columns alone), its speed, its note."""
    wanted = None if names is None else {"method", "budget", *(f"{n}{end}" for n in names for end in ENDS)}
    timed = {(row["method"], row["budget"]): row for row in speed.rows}
    ends = [f"{name}{end}" for name in TIMED for end in ENDS]
    rows: list[Row] = []
    for row in quality.rows:
        one = timed[row["method"], row["budget"]]
        told = {name: cell for name, cell in row.items() if name != "note" and (wanted is None or name in wanted)}
        rows.append({**told, **{name: one[name] for name in ends if name in one}, "note": row["note"]})
    return Table(rows, {**quality.environment, **speed.environment})


def measure_budgets(
    loaded: LoadedModel,
    data: ImageData,
    images: Tensor,
    methods: Sequence[str] | None,
    budgets: Sequence[Budget],
    folder: Path,
    *,
    samples: int | None,
    batch_size: int,
    rounds: int,
    seed: int,
    show_progress: bool,
) -> Iterator[tuple[list[Arm], Table]]:
    """For each budget in turn its arms, the unpatched one first, and their table, one row each.

    images: [B, C, H, W], of the batch that is timed. An adaptive method meets a budget in `flops` in the mean over
    CALIBRATED_ON of the images, whose labels are not read. A smaller input stands there once for each filter that
    shrinks pictures, as one of them suits a model best. A table that is in `folder` already is read and not measured
    again; the arms are built anew for each budget, as pictures need them.
    """
    saliency = loaded.saliency if data.classes is None else None
    seen = list[UnpatchedBatch]()

    def measure(arms: list[Arm]) -> Table:
        if not seen:  # through the unpatched model once for all budgets
            seen.extend(
                run_unpatched(
                    arms[0],
                    data,
                    batch_size=batch_size,
                    samples=samples,
                    seed=seed,
                    saliency=saliency,
                    show_progress=show_progress,
                )
            )
        quality = compare(arms, seen, data, samples=samples, seed=seed, saliency=saliency)
        speed = bench_together(arms, images, rounds=rounds, seed=seed, show_progress=show_progress)
        table = join(quality, speed)
        table.environment = {"model": loaded.name, "batch": len(images), **table.environment}
        return table

    dense = saliency is not None or data.dense
    unlabelled = first_images(data, CALIBRATED_ON, seed + 1).to(images)
    base = tokenprune.unpatch(shared_copy(loaded.model)).eval()
    calibrated, required = Calibrated(base, images, unlabelled, batch_size, dense), methods is not None
    names = comparable(base) if methods is None else methods

    def make(name: str, budget: Budget, **_: bool) -> Arm:
        return calibrated.arm(name, budget, required=required)

    for budget in budgets:
        arms = build_arms(loaded.model, images, names, [budget], dense=dense, make=make)
        smaller = [arm for arm in arms if arm.method == SMALLER_INPUT and arm.model is not None]
        arms += [filtered(arm, by) for arm in smaller for by in FILTERS[1:]]
        yield arms, measured_once(measured_path(folder, loaded.name, budget), partial(measure, arms))


def measured_path(folder: Path, model: str, budget: Budget) -> Path:
    """Where in `folder` the rows of a model at a budget are kept."""
    return folder / f"{model.replace('/', '--').replace(':', '--')}-{budget_label(budget)}.json"


def measured_once(path: Path, measure: Callable[[], Table]) -> Table:
    """The table that is kept in `path`, else the one that `measure` gives, which then is.

    Raises:
        TokenPruneError: the file is damaged.
    """
    if path.exists():
        try:
            return Table.from_json(path.read_text(encoding="utf-8"))
        except MALFORMED as error:
            raise TokenPruneError(f"{path} is damaged: {error!r}; remove it, and it is measured again") from error
    table = measure()
    table.save(path)
    return table


def same_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Writes down what a comparison into `folder` was asked for, or checks that one which goes on was asked the same.

    Raises:
        TokenPruneError: the folder holds another comparison.
    """
    path, asked = folder / "settings.json", json.loads(json.dumps(dict(settings)))
    if not path.exists() or list(folder.iterdir()) == [path]:  # the latter failed before it measured anything
        path.write_text(json.dumps(asked, indent=1), encoding="utf-8")
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except MALFORMED as error:
        raise TokenPruneError(f"{path} is damaged: {error}; take another folder") from error
    others = sorted(name for name in {*asked, *found} if asked.get(name) != found.get(name))
    if others:
        told = "; ".join(f"{name} {found.get(name)!r}, now {asked.get(name)!r}" for name in others)
        raise TokenPruneError(f"{folder} holds a comparison with other settings ({told}); take another folder")
