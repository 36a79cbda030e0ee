"""`tokenprune demo`: every method on the shipped ViT, measured now, on this machine, without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tokenprune.evals.accuracy import evaluate_arms
from tokenprune.evals.arms import budget_label, build_arms
from tokenprune.evals.bench import bench_together
from tokenprune.evals.commands import kept_rows, set_machine
from tokenprune.evals.comparison.measuring import join
from tokenprune.evals.models import DIGITS, load_model
from tokenprune.evals.plot import plot_accuracy_against_speed
from tokenprune.evals.viz import contact_sheet

BUDGETS = ({"flops": 0.8}, {"flops": 0.6})
PICTURE_BUDGET = {"flops": 0.6}
BATCH = 16
PLACES = 5
COLUMNS = ("top1", "top1_drop", "agreement", "flops_ratio")


def run(options: argparse.Namespace) -> int:
    """Writes table.{md,csv,json}, kept-tokens.png and accuracy-against-speed.png into the output folder."""
    set_machine(options)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_model(DIGITS)
    loaded.model.to(options.device, getattr(torch, options.dtype))
    assert loaded.data is not None
    data = loaded.data(options.samples, options.seed)
    show = not options.quiet
    images = next(data.batches(BATCH))[0].to(options.device, getattr(torch, options.dtype))
    arms = build_arms(loaded.model, images, None, BUDGETS)
    quality = evaluate_arms(arms, data, seed=options.seed, show_progress=show)
    # A busy machine shows up in the column `trusted`; trying again, and measuring each method by itself, would take the
    # demo past its two minutes.
    speed = bench_together(arms, images, seed=options.seed, show_progress=show)
    table = join(quality, speed, COLUMNS)
    table.environment = {"model": DIGITS, "batch": BATCH, **table.environment}
    for suffix in (".md", ".csv", ".json"):
        table.save(folder / f"table{suffix}")
    plot_accuracy_against_speed(table, folder / "accuracy-against-speed.png")
    shown = [arm for arm in arms if arm.is_patched and arm.budget == budget_label(PICTURE_BUDGET)]
    contact_sheet(kept_rows(loaded, images[:1], shown, places=PLACES)).save(folder / "kept-tokens.png")
    if options.format == "json":
        print(table.to_json())
        return 0
    print(table.to_text())
    print(f"written to {folder}: table.md, table.csv, table.json, accuracy-against-speed.png, kept-tokens.png")
    return 0
