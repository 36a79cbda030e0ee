"""How good `region` paints a digit anew under a mask: against inpainting that computes everything, on the small DiT.

    python -m tokenprune.evals.region_quality --output FOLDER

Originals are pictures of test scans whose digit lies at one of nine places; the mask lies over that place, so that all
pictures of a place are one batch. The model is asked for the digit that was there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tokenprune.evals.digit_reader import DigitReader, digit_reader, read
from tokenprune.evals.digits_denoisers import DIT
from tokenprune.evals.digits_pipelines import GUIDANCE, DigitsPipeline, digits_pipeline
from tokenprune.evals.drawn_digits import IMAGE_SIZE, PIXEL_MEAN, PIXEL_STD, to_pixels
from tokenprune.evals.frechet import bootstrap_frechet, gaussian, interval
from tokenprune.evals.inpainting import BATCH, MASKS, STEPS, Originals, Way, batches, inpaint, mask_at, originals, under
from tokenprune.evals.kept_pictures import draw_missing, kept
from tokenprune.evals.stats import Interval, bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.methods.region import EARLY

EDGE = 2
"""Pixels on each side of a mask's edge in which the boundary error is taken."""

REAL_IMAGES = 2000
REAL = 6
"""The series of `drawn_digit_pictures` that distances are measured to."""


def _region(*dense: int, steps: int = STEPS) -> Way:
    return Way(f"region, dense_steps={dense}" if dense != (0,) else "region, stale context", steps, dense)


def _early(steps: int = STEPS) -> Way:
    return Way("region", steps, EARLY)


def _whole(steps: int, of: int = STEPS) -> Way:
    return Way("full" if steps == of else f"{steps} steps", steps)


WAYS: Mapping[str, tuple[str, Sequence[Way]]] = {
    "part": (
        "part",
        (
            *(_whole(10), _early(), _region(0, 1), _region(0), _whole(4)),
            *(_region(0, 1, 2), _region(0, 1, 2, 3), _region(0, 1, 2, 4), _region(0, 1, 2, 3, 4)),
            *(_whole(5), _whole(6), _whole(7)),
        ),
    ),
    "digit": ("digit", (_whole(10), _early(), _region(0, 1), _region(0), _whole(6), _region(0, 1, 2, 3), _whole(7))),
    "part-20": (
        "part",
        (
            *(_whole(20, 20), _early(20), _region(0, 1, steps=20), _region(0, steps=20), _region(0, 2, 4, steps=20)),
            *(_region(0, 1, 2, 3, steps=20), _region(0, 1, 2, 3, 4, 6, steps=20)),
            *(_whole(7, 20), _whole(8, 20), _whole(9, 20)),
        ),
    ),
    "part-50": (
        "part",
        (
            *(_whole(50, 50), _early(50)),
            *(_region(0, 2, 5, 8, 12, 17, steps=50), _region(0, 2, 4, 6, 8, 10, steps=50)),
            *(_region(0, steps=50), _whole(15, 50)),
        ),
    ),
}
"""Masks and ways, the first one full. Dense steps: early ones came closest to the full computation's pictures of
another series. Fewer steps: as many as `region` takes FLOPs."""


def boundary_errors(pictures: Tensor, given: Originals, side: int) -> Tensor:
    """Mean squared difference [N] to the originals in [0, 1] within EDGE pixels of the mask's edge, on both sides."""
    off = (pictures - to_pixels(given.images)).double().square().mean(1)
    errors = []
    for error, place in zip(off, given.places, strict=True):
        mask = mask_at(place, side)
        errors.append(error[edge_band(mask)].mean())
    return torch.stack(errors)


def edge_band(mask: Tensor) -> Tensor:
    """Where a mask [H, W] or its complement is within EDGE pixels: bool [H, W]. Beyond the picture there is neither."""
    grow = partial(torch.nn.functional.max_pool2d, kernel_size=2 * EDGE + 1, stride=1, padding=EDGE)
    return (grow(mask[None])[0] > 0) & (grow(1 - mask[None])[0] > 0)


def _draw(pipe: DigitsPipeline, way: Way, parts: Sequence[Originals], side: int, number: int) -> Tensor:
    return inpaint(pipe, way, parts[number], side)[0]


def flops_ratio(pipe: DigitsPipeline, way: Way, given: Originals, side: int) -> float:
    """Multiply-adds over those of the unpatched STEPS steps, the mean over the pictures."""
    if way.dense is None:
        return way.steps / STEPS
    one = {tuple(batch.places[0].tolist()): batch for batch in batches(given)}
    ratios = {at: inpaint(pipe, way, Originals(*(part[:1] for part in batch)), side)[1] for at, batch in one.items()}
    return sum(ratios[row, column] for row, column in given.places.tolist()) / len(given.places)


def quality_rows(
    ways: Mapping[str, Tensor], given: Originals, real: Originals, side: int, reader: DigitReader | None = None
) -> list[Row]:
    """A row for each way's pictures [N, 3, 36, 36], the first one being the full computation that others are held to.

    Columns: `frechet` between the reader's features of the squares under the masks and those of `real` ones,
    `accuracy` of the reader on whole pictures, `boundary`, root of the mean squared error in the band around the mask's
    edge; each with a 95% interval over pictures, and `..._ratio`, over the full computation's, paired.
    """
    reader, rows, base = reader or digit_reader(), list[Row](), None
    distances = gaussian(read(reader, under(real.images, real.places, side))[0])
    for name, pictures in ways.items():
        images = (pictures - PIXEL_MEAN) / PIXEL_STD
        found, draws = bootstrap_frechet(read(reader, under(images, given.places, side))[0], distances)
        right = (read(reader, images)[1] == given.labels).double()
        edges = boundary_errors(pictures, given, side)
        base = base or (found, draws, right, edges)
        row: Row = {
            "way": name,
            **interval_cells("frechet", found),
            **interval_cells("accuracy", bootstrap_mean(right)),
        }
        row |= interval_cells("boundary", _ratio(edges, torch.ones_like(edges), 0.5))
        if base[2] is not right:
            row |= interval_cells("frechet_ratio", interval(found.estimate / base[0].estimate, draws / base[1]))
            row |= interval_cells("accuracy_ratio", _ratio(right, base[2]))
            row |= interval_cells("boundary_ratio", _ratio(edges, base[3], 0.5))
        rows.append(row)
    return rows


def _ratio(values: Tensor, others: Tensor, power: float = 1.0, resamples: int = 1000) -> Interval:
    """(mean of values [N] / mean of others [N]) ** power with a paired percentile bootstrap."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (resamples, len(values)), generator=generator)
    draws = values[index].mean(1) / others[index].mean(1)
    return interval(float(values.mean() / others.mean()) ** power, draws**power)


def main(arguments: Sequence[str] | None = None) -> int:
    """Inpaints in every way and writes region-quality.md and .json into the folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.region_quality", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples", type=int, default=1000, help="pictures a row (default: %(default)s)")
    parser.add_argument("--ways", action="append", choices=list(WAYS), help="repeatable (default: all)")
    parser.add_argument("--device", default="cpu", help="to draw on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="pictures drawn at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be what it is on a CPU
    pipe, rows = digits_pipeline(DIT), list[Row]()
    pipe.to(options.device)
    given, real = originals(options.samples), originals(REAL_IMAGES, series=REAL)
    parts, reader = batches(given, options.batch_size), digit_reader().to(options.device)
    pictures = options.output / f"region-{options.samples}" / f"by-{options.batch_size}"
    conditions: Row = {"images": options.samples, "guidance": GUIDANCE, "real images": REAL_IMAGES}
    table = Table(rows, conditions | environment(options.device))
    for name in options.ways or WAYS:
        mask, ways = WAYS[name]
        side, drawn = MASKS[mask], dict[str, Tensor]()
        for way in ways:
            folder = pictures / f"{name}-{way.name}-{way.steps}-{way.dense}"
            draw_missing(folder, len(parts), partial(_draw, pipe, way, parts, side))
            found = kept(folder, len(parts))
            assert found is not None
            drawn[way.name] = found
            print(f"drawn: {name}, {way.name}", flush=True)
        costs = [flops_ratio(pipe, way, given, side) for way in ways]
        for way, cost, row in zip(ways, costs, quality_rows(drawn, given, real, side, reader), strict=True):
            told: Row = {"mask": side**2 / IMAGE_SIZE**2, "way": way.name, "steps": way.steps}
            rows.append({**told, "flops_ratio": cost / costs[0], **row})
        for suffix in ("md", "json"):
            table.save(options.output / f"region-quality.{suffix}")
    print(table.to_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
