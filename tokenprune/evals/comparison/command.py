"""`tokenprune compare`: every method at every budget on one or several models, as tables and one page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.commands import budgets, first_images, image_data, image_files, set_machine
from tokenprune.evals.comparison.measuring import measure_budgets, same_settings
from tokenprune.evals.comparison.overlays import overlays, pictures
from tokenprune.evals.comparison.page import Compared, write_page
from tokenprune.evals.digits_denoisers import CHECKPOINTS as DIFFUSION
from tokenprune.evals.digits_lvlm import LVLM
from tokenprune.evals.models import load_model
from tokenprune.evals.table import Table
from tokenprune.evals.transforms import denormalize

BUDGETS = ({"flops": 0.8}, {"flops": 0.6}, {"flops": 0.5}, {"flops": 0.4})
PICTURES = 3
MEASURED = "measured"


def run_compare(options: argparse.Namespace) -> int:
    """Writes compare.html and compare.{json,csv,md} into the output folder, and what is measured as it comes.

    0 where a method could be run, else 1.
    """
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
    return 0 if any(one.overlays["arms"] for one in compared) else 1


def _model(name: str, options: argparse.Namespace, measured: Path) -> Compared:
    if name in (*DIFFUSION, LVLM):
        raise TokenPruneError(f"compare is of image models; for {name} tokenprune eval has all methods in one table")
    loaded = load_model(name, random_weights=options.random_weights)
    loaded.model.to(options.device, getattr(torch, options.dtype))
    options = argparse.Namespace(**{**vars(options), "model": name})
    data = image_data(options, loaded, options.samples)
    images = first_images(data, options.batch_size, options.seed).to(options.device, getattr(torch, options.dtype))
    shown = image_files(options.image, loaded).to(images) if options.image else images[:PICTURES]
    rows, found, grid = list[Any](), list[Any](), None
    environment: dict[str, Any] = {}
    for arms, table in measure_budgets(
        loaded,
        data,
        images,
        options.method,
        budgets(options, BUDGETS),
        measured,
        samples=options.samples,
        batch_size=options.batch_size,
        rounds=options.rounds,
        seed=options.seed,
        show_progress=not options.quiet,
    ):
        rows += table.rows if not rows else table.rows[1:]
        environment = environment or table.environment
        drawn = overlays(arms, shown)
        found, grid = [*found, *drawn["arms"]], grid or drawn["grid"]
    faces = denormalize(shown.float().cpu(), loaded.mean, loaded.std)
    return Compared(
        name=name,
        table=Table(rows, environment),
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
