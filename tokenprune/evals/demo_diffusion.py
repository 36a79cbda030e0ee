"""`tokenprune demo-diffusion`: the small diffusion models, unpatched and each method from the same noise."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.evals.commands import set_machine
from tokenprune.evals.digits_denoisers import CHECKPOINTS
from tokenprune.evals.digits_pipelines import GUIDANCE, STEPS, digits_pipeline
from tokenprune.evals.drawing_orders import Orders, drawing_orders
from tokenprune.evals.generation import real_features, score_drawings
from tokenprune.evals.generation_arms import GenerationArm, generation_arms
from tokenprune.evals.progress import progress
from tokenprune.evals.table import Cell, Row, Table, environment
from tokenprune.evals.viz import Panel, contact_sheet

BUDGET = {"flops": 0.8}
BATCH = 10
SCALE = 2


def run(options: argparse.Namespace) -> int:
    """Writes pictures-MODEL.png and table.{md,csv,json} into the output folder, for both models.

    Every batch of pictures goes through all rows in turn, so that a busy moment of the machine hits them alike. Column
    `time`: of a batch over the unpatched row's, the median of so few rounds; `tokenprune bench` measures with more.
    """
    set_machine(options)
    pipes = {name: digits_pipeline(name, options.checkpoint or ()) for name in CHECKPOINTS}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    real = real_features()
    for name, pipe in pipes.items():
        pipe.to(options.device, getattr(torch, options.dtype))
        orders = drawing_orders(options.samples, options.seed)
        arms = generation_arms(pipe, orders.first(1), None, [BUDGET], steps=STEPS, guidance=GUIDANCE)
        drawings, times = draw_in_turn(arms, orders, show=not options.quiet)
        sheet: list[list[Panel]] = []
        for row, drawn, ratio in zip(score_drawings(arms, drawings, orders.labels, real), drawings, times, strict=True):
            kept = {key: cell for key, cell in row.items() if not key.startswith("frechet")}
            rows.append({"model": name, "time": ratio, **kept})
            if drawn is not None:
                sheet.append(_panels(rows[-1], drawn[:BATCH]))
        contact_sheet(sheet).save(folder / f"pictures-{name}.png")
    rounds = -(-options.samples // BATCH)
    table = Table(rows, {"images": options.samples, "rounds": rounds, "guidance": GUIDANCE} | environment())
    for suffix in (".md", ".csv", ".json"):
        table.save(folder / f"table{suffix}")
    if options.format == "json":
        print(table.to_json())
        return 0
    print(table.to_text())
    names = ", ".join(f"pictures-{name}.png" for name in CHECKPOINTS)
    print(f"written to {folder}: table.md, table.csv, table.json, {names}")
    return 0


def draw_in_turn(
    arms: Sequence[GenerationArm], orders: Orders, *, show: bool
) -> tuple[list[Tensor | None], list[float | None]]:
    """Each arm's pictures [N, 3, S, S], None where it could not be built, and its time over the first arm's."""
    pictures: list[list[Tensor]] = [[] for _ in arms]
    seconds: list[list[float]] = [[] for _ in arms]
    for batch in progress(list(orders.batches(BATCH)), "drawing", show=show):
        for arm, drawn, taken in zip(arms, pictures, seconds, strict=True):
            if arm.pipe is not None:
                start = time.perf_counter()
                drawn.append(arm.draw(batch).float().cpu())
                taken.append(time.perf_counter() - start)
    ratios = [
        statistics.median(one / base for one, base in zip(taken, seconds[0], strict=True)) if taken else None
        for taken in seconds
    ]
    return [torch.cat(drawn) if drawn else None for drawn in pictures], ratios


def _panels(row: Row, pictures: Tensor) -> list[Panel]:
    """A strip of pictures over a caption with what it cost and what it gave."""
    strip = torch.cat(list(pictures), dim=2).repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)
    parts = [
        f"{row['method']} {row['budget']}".strip(),
        f"time {_short(row['time'])}",
        f"digit {_short(row['accuracy'])}",
    ]
    if row.get("psnr") is not None:
        parts.append(f"PSNR {_short(row['psnr'])} dB")
    return [(", ".join(parts), (strip * 255).round().to(torch.uint8).permute(1, 2, 0))]


def _short(cell: Cell) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else "-"
