"""`tokenprune compare`: every method at every budget on one or several models, as tables and one page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.arms import Budget, is_unpatched
from tokenprune.evals.commands import budgets, first_images, image_data, image_files, set_machine
from tokenprune.evals.comparison.answering import answer_budgets
from tokenprune.evals.comparison.measuring import measure_budgets, same_settings
from tokenprune.evals.comparison.overlays import overlays, pictures
from tokenprune.evals.comparison.page import Compared, write_page
from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
from tokenprune.evals.digits_lvlm import LVLM, lvlm_digits
from tokenprune.evals.models import load_model
from tokenprune.evals.table import Row, Table
from tokenprune.evals.throughput import LEAST_ROUNDS
from tokenprune.evals.transforms import denormalize

BUDGETS: tuple[Budget, ...] = ({"flops": 0.8}, {"flops": 0.6}, {"flops": 0.5}, {"flops": 0.4})
DRAWN_BUDGETS: tuple[Budget, ...] = ({"flops": 0.8}, {"flops": 0.65})
ANSWERED_BUDGETS: tuple[Budget, ...] = ({"keep": 0.5}, {"keep": 0.25})
IMAGES, DRAWN, ANSWERED = 500, 100, 75
PICTURES = 3
MEASURED = "measured"


def run_compare(options: argparse.Namespace) -> int:
    """Writes compare.html and compare.{json,csv,md} into the output folder, and what is measured as it comes.

    0 where a method could be run, else 1.
    """
    if options.rounds < LEAST_ROUNDS:
        raise TokenPruneError(f"--rounds {options.rounds}: an interval needs at least {LEAST_ROUNDS}")
    set_machine(options)
    folder = Path(options.output)
    measured = folder / MEASURED
    measured.mkdir(parents=True, exist_ok=True)
    shown_alone = ("command", "output", "quiet", "image", "format")
    asked = {name: value for name, value in vars(options).items() if name not in shown_alone}
    same_settings(measured, asked)
    compared = [_model(name, options, measured) for name in options.model]
    rows = [{"model": one.name, **row} for one in compared for row in one.table.rows]
    table = Table(rows, {k: v for k, v in compared[0].table.environment.items() if k != "model"})
    for suffix in (".md", ".csv", ".json"):
        table.save(folder / f"compare{suffix}")
    write_page(folder / "compare.html", compared, _as_typed(options))
    if options.format == "json":
        print(table.to_json())
    else:
        print(f"written to {folder}: compare.html, compare.md, compare.csv, compare.json")
    return 0 if any(_ran(row) for one in compared for row in one.table.rows) else 1


def _ran(row: Row) -> bool:
    return row.get("flops_ratio") is not None and not is_unpatched(str(row["method"]))


def _model(name: str, options: argparse.Namespace, measured: Path) -> Compared:
    of = _diffusion if name in DIFFUSION else _answering if name == LVLM else _images
    return of(name, options, measured)


def _diffusion(name: str, options: argparse.Namespace, measured: Path) -> Compared:
    from tokenprune.evals.comparison.drawing import draw_budgets
    from tokenprune.evals.digits_pipelines import STEPS, digits_pipeline

    _refuse(name, options, "data", "split", "image", "random_weights")
    pipe = digits_pipeline(name)
    pipe.to(options.device, getattr(torch, options.dtype))
    found = list(
        draw_budgets(
            pipe,
            name,
            options.method,
            budgets(options, DRAWN_BUDGETS),
            measured,
            samples=options.samples or DRAWN,
            batch_size=options.batch_size,
            steps=options.steps or STEPS,
            rounds=options.rounds,
            seed=options.seed,
            show_progress=not options.quiet,
        )
    )
    drawn = [one for number, (_, some) in enumerate(found) for one in (some if number == 0 else some[1:])]
    return Compared(name, _one_table([table for table, _ in found]), drawn=drawn)


def _answering(name: str, options: argparse.Namespace, measured: Path) -> Compared:
    _refuse(name, options, "data", "split", "image", "random_weights", "steps")
    if options.device != "cpu" or options.dtype != "float32":
        raise TokenPruneError(f"{name} is compared in float32 on the CPU; leave out --device and --dtype")
    tables = answer_budgets(
        lvlm_digits(),
        name,
        options.method,
        budgets(options, ANSWERED_BUDGETS),
        measured,
        samples=options.samples or ANSWERED,
        batch_size=options.batch_size,
        rounds=options.rounds,
        seed=options.seed,
        show_progress=not options.quiet,
    )
    return Compared(name, _one_table(list(tables)))


def _refuse(name: str, options: argparse.Namespace, *foreign: str) -> None:
    given = [f"--{option.replace('_', '-')}" for option in foreign if getattr(options, option)]
    if given:
        raise TokenPruneError(f"{name} makes its own pictures; it takes no {', '.join(given)}")


def _one_table(tables: Sequence[Table]) -> Table:
    """The rows of all budgets, the unpatched one once."""
    rows = [row for number, table in enumerate(tables) for row in (table.rows if number == 0 else table.rows[1:])]
    return Table(rows, tables[0].environment)


def _images(name: str, options: argparse.Namespace, measured: Path) -> Compared:
    _refuse(name, options, "steps")
    loaded = load_model(name, random_weights=options.random_weights)
    loaded.model.to(options.device, getattr(torch, options.dtype))
    options = argparse.Namespace(**{**vars(options), "model": name})
    samples = options.samples or IMAGES
    data = image_data(options, loaded, samples)
    images = first_images(data, options.batch_size, options.seed).to(options.device, getattr(torch, options.dtype))
    shown = image_files(options.image, loaded).to(images) if options.image else images[:PICTURES]
    tables, found, grid = list[Table](), list[Any](), None
    for arms, table in measure_budgets(
        loaded,
        data,
        images,
        options.method,
        budgets(options, BUDGETS),
        measured,
        samples=samples,
        batch_size=options.batch_size,
        rounds=options.rounds,
        seed=options.seed,
        show_progress=not options.quiet,
    ):
        tables.append(table)
        drawn = overlays(arms, shown)
        found, grid = [*found, *drawn["arms"]], grid or drawn["grid"]
    faces = denormalize(shown.float().cpu(), loaded.mean, loaded.std)
    return Compared(
        name=name,
        table=_one_table(tables),
        pictures=[] if grid is None else pictures(faces, grid),
        overlays={"grid": grid, "arms": found},
    )


def _as_typed(options: argparse.Namespace) -> str:
    """The command that measures the same again."""
    words = ["tokenprune", "compare"]
    for name, value in vars(options).items():
        if name in ("command", "output", "quiet", "format") or value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [w for one in _listed(value) for w in (flag, str(one))]
    return shlex.join([*words, "--output", str(Path(options.output).name)])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
