"""The quality of the small diffusion models' pictures against measured time, for the rows of docs/diffusion-quality.md.

    python -m tokenprune.evals.generation_curves dit-digits --output FOLDER

Pictures and what was found of them are kept in FOLDER, so that a run which is stopped goes on where it was; `--rows 3`
draws at most three more rows. `--rounds 20` draws none and times whole runs instead, all rows that have no times in
turn. Pictures may be drawn on a GPU (`--device cuda --batch-size 500`), from the same noise; times are the CPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.evals.digit_reader import digit_reader
from tokenprune.evals.digits_denoisers import CHECKPOINTS
from tokenprune.evals.digits_pipelines import digits_pipeline
from tokenprune.evals.drawing_orders import Orders, drawing_orders
from tokenprune.evals.generation import arm_cells, quality_cells, real_features, score
from tokenprune.evals.generation_arms import GenerationArm, unpatched_arm
from tokenprune.evals.generation_bench import time_together
from tokenprune.evals.generation_rows import ROWS, STEPS, Kind, build, name_of
from tokenprune.evals.generation_scores import Scored, curve_table, load_scores, save_scores
from tokenprune.evals.kept_pictures import draw_missing, kept
from tokenprune.evals.plot import plot_accuracy_against_speed
from tokenprune.evals.table import Row, Table, environment

TIMED_BATCH = 2


def draw_row(arm: GenerationArm, orders: Orders, place: Path, batch: int) -> Tensor:
    """The arm's pictures [N, 3, 36, 36] in [0, 1]; those that are in the folder `place` are not drawn again."""
    batches = list(orders.batches(batch))
    draw_missing(place, len(batches), lambda number: arm.draw(batches[number]))
    pictures = kept(place, len(batches))
    assert pictures is not None
    return pictures


def score_rows(
    first: GenerationArm, kinds: Sequence[Kind], orders: Orders, pictures: Path, batch: int
) -> Iterator[tuple[str, Scored | None]]:
    """(name, what was found) of a row after the other, held to the pictures of the unpatched `first`; None where the
    row failed, and why is printed.

    pictures: the folder in which a row's are kept, `batch` in a file.
    """
    if not kinds:
        return
    assert first.model is not None
    device = next(first.model.parameters()).device
    reader = digit_reader().to(device)
    real, told = real_features(reader=reader), str(environment(device)["device"])
    base = score(draw_row(first, orders, pictures / name_of(STEPS, STEPS), batch), orders.labels, reader, real)
    for kind in kinds:
        name = name_of(kind, STEPS)
        try:
            arm = build(first, kind, orders)
            cells, draws = arm_cells(arm), list[float]()
            if arm.pipe is not None:
                drawn = base
                if arm is not first:
                    drawn = score(draw_row(arm, orders, pictures / name, batch), orders.labels, reader, real)
                cells |= quality_cells(drawn, None if arm is first else base)
                draws = drawn.draws.tolist()
            yield name, {"cells": {**cells, "note": arm.note}, "draws": draws, "device": told}
        except Exception:  # one row is not to cost the others the hours that they take
            traceback.print_exc()
            yield name, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws or times the rows, and writes curves-MODEL.md, .json and .png of what is drawn into the folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.generation_curves", description=main.__doc__)
    parser.add_argument("model", choices=list(CHECKPOINTS))
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=1000, help="pictures a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="draw or time at most so many more (default: all)")
    parser.add_argument("--rounds", type=int, help="time so many rounds instead of drawing")
    parser.add_argument("--device", default="cpu", help="to draw on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=10, help="pictures drawn at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.device != "cpu":
        parser.error("--rounds: times are taken on the CPU, without --device")
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be what it is on a CPU
    if options.samples % options.batch_size:
        parser.error(f"--samples {options.samples}: pictures are drawn and kept {options.batch_size} at a time")
    folder: Path = options.output / f"{options.model}-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    orders, kinds = drawing_orders(options.samples, options.seed), (STEPS, *ROWS[options.model])
    clocked, found = folder / "times.json", folder / f"scores-{options.samples}.json"
    times: dict[str, Row] = json.loads(clocked.read_text()) if clocked.exists() else {}
    scores, failed = load_scores(found), list[str]()
    pipe = digits_pipeline(options.model)
    pipe.to(options.device)
    first = unpatched_arm(pipe, orders.first(2), steps=STEPS)

    def save() -> Table:
        table = curve_table(kinds, scores, times, samples=options.samples, steps=STEPS)
        for suffix in ("md", "json"):
            table.save(options.output / f"curves-{options.model}.{suffix}")
        return table

    if options.rounds is not None:
        reachable = [k for k in kinds[1:] if (found_of := scores.get(name_of(k, STEPS))) is None or found_of["draws"]]
        untimed = [kind for kind in reachable if name_of(kind, STEPS) not in times][: options.rows]
        arms = {name_of(kind, STEPS): build(first, kind, orders) for kind in (STEPS, *untimed)}
        timed = time_together(list(arms.values()), orders.first(TIMED_BATCH), rounds=options.rounds)
        times |= {name: one.cells() for name, one in zip(arms, timed, strict=True) if one is not None}
        clocked.write_text(json.dumps(times, indent=1))
    else:
        missing = [kind for kind in kinds if name_of(kind, STEPS) not in scores][: options.rows]
        pictures = folder / f"by-{options.batch_size}"
        for name, scored in score_rows(first, missing, orders, pictures, options.batch_size):
            if scored is None:
                failed.append(name)
                continue
            scores[name] = scored
            save_scores(scores, found)
            save()
            print(f"{'drawn' if scored['draws'] else 'out of reach'}: {name}", flush=True)
    if not scores:
        return 0  # only timed yet
    table = save()
    plot_accuracy_against_speed(table, options.output / f"curves-{options.model}.png", "frechet")
    print(table.to_text())
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
