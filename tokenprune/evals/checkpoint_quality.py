"""Pictures of one diffusion model after several trainings, from the same noise.

python -m tokenprune.evals.checkpoint_quality dit-digits plain masked --samples 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tokenprune.budget import checked_count
from tokenprune.evals.digit_reader import digit_reader
from tokenprune.evals.digits_denoisers import CHECKPOINTS
from tokenprune.evals.digits_pipelines import GUIDANCE, STEPS, digits_pipeline
from tokenprune.evals.drawing_orders import drawing_orders
from tokenprune.evals.frechet import interval
from tokenprune.evals.generation import draw, quality_cells, real_features, score, together
from tokenprune.evals.generation_arms import unpatched_arm
from tokenprune.evals.table import Row, Table, environment, interval_cells


def compare_checkpoints(
    name: str,
    folders: Sequence[str | Path],
    *,
    samples: int = 1000,
    batch_size: int = 50,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    seed: int = 0,
    show_progress: bool = False,
) -> Table:
    """A row for the model called `name` as it was trained in each of `folders`.

    Columns: `checkpoint`, those of `tokenprune.evals.generation.evaluate_generation`, where the first checkpoint's
    pictures stand for the unpatched model's, and `frechet_ratio`, the distance over that of the first, with a 95%
    bootstrap interval paired over noise.

    Raises TokenPruneError, before anything is drawn, for a folder without a checkpoint of the model, for fewer than two
    samples and for a batch or a run without anything in it.
    """
    checked_count("samples", samples, smallest=2, example=1000)
    checked_count("batch_size", batch_size, smallest=1, example=50)
    checked_count("steps", steps, smallest=1, example=STEPS)
    pipes = [digits_pipeline(name, [folder]) for folder in folders]
    orders = drawing_orders(samples, seed)
    real, reader, rows = real_features(), digit_reader(), list[Row]()
    first = None
    for folder, pipe in zip(folders, pipes, strict=True):
        arm = unpatched_arm(pipe, orders.first(2), steps=steps, guidance=guidance)
        named = replace(arm, method=str(folder))
        pictures = together(draw(named, list(orders.batches(batch_size)), show_progress=show_progress))
        assert pictures is not None
        scores = score(pictures, orders.labels, reader, real, seed=seed)
        row: Row = {"checkpoint": str(folder), **quality_cells(scores, first, seed=seed)}
        first = first or scores
        ratio = scores.distance.estimate / first.distance.estimate
        rows.append(row | interval_cells("frechet_ratio", interval(ratio, scores.draws / first.draws)))
    return Table(rows, {"model": name, "images": samples, "steps": steps, "guidance": guidance, **environment()})


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` replaces the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenprune.evals.checkpoint_quality", description="Compare trainings of one diffusion model."
    )
    parser.add_argument("model", choices=sorted(CHECKPOINTS), help="the diffusion model")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with a checkpoint; the others beside the first")
    parser.add_argument("--samples", type=int, default=1000, help="pictures of each (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=50, help="of drawing (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = compare_checkpoints(
        options.model,
        options.folders,
        samples=options.samples,
        batch_size=options.batch_size,
        steps=options.steps,
        seed=options.seed,
        show_progress=True,
    )
    print(table.to_markdown())


if __name__ == "__main__":
    main()
