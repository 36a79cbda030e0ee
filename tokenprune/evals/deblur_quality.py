"""What leaving windows out of the shipped restoration network costs: PSNR where the photograph was blurred.

    python -m tokenprune.evals.deblur_quality --output deblur.md

Crops are of photographs that neither the network nor what `adawpt` has learned has seen, 30 to 50% of their area
blurred, of three seeds. All rows are of the same crops, intervals resample photographs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.deblur_swin import IMAGE_SIZE, deblur_swin
from tokenprune.evals.local_blur import TEST_SHARES, Blurred, locally_blurred, psnr
from tokenprune.evals.stats import bootstrap_mean
from tokenprune.evals.table import Row, Table, environment, interval_cells

SEEDS = (301, 302, 303)
METHODS = ("adawpt", "sparsevit", "random")
BATCH = 10


def compare(model: nn.Module, crops: Blurred, *, flops: float, weights: str | None = None) -> list[Row]:
    """A row for the crops as they are, the unpatched network and each method. Columns: `flops`, the mean over crops;
    `blurred`, PSNR in dB within the blurred part, with a 95% interval over photographs; `gain` over the input and
    `loss` to the unpatched network there, paired; `sharp`, PSNR in the other part, of what is there already."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(crops.sources))}
    groups = torch.tensor([numbers[name] for name in crops.sources])
    before = psnr(crops.images, crops.sharp, crops.mask)
    rows: list[Row] = [{"network": "input", **interval_cells("blurred", bootstrap_mean(before, groups=groups))}]
    dense = None
    for name in ("unpatched", *METHODS):
        told = {"weights": weights} if name == "adawpt" else {}
        with nullcontext() if name == "unpatched" else tokenprune.patched(model, name, flops=flops, **told):
            restored, ratio = _restored(model, crops.images, patched=name != "unpatched")
        after = psnr(restored, crops.sharp, crops.mask)
        dense = after if dense is None else dense
        row: Row = {"network": name, "flops": ratio}
        row |= interval_cells("blurred", bootstrap_mean(after, groups=groups))
        row |= interval_cells("gain", bootstrap_mean(after - before, groups=groups))
        if name != "unpatched":
            row |= interval_cells("loss", bootstrap_mean(dense - after, groups=groups))
        row["sharp"] = psnr(restored, crops.sharp, ~crops.mask).mean().item()
        rows.append(row)
    return rows


def _restored(model: nn.Module, images: Tensor, *, patched: bool) -> tuple[Tensor, float]:
    """What the network makes of images [N, 3, H, W], and what that costs in the mean, counted."""
    parts, total = [], 0.0
    with torch.inference_mode():
        for part in torch.split(images, BATCH):
            parts.append(model(part))
            total += len(part) * (tokenprune.report(model).to_dict()["flops_ratio"] if patched else 1.0)
    return torch.cat(parts), total / len(images)


def held_out(count: int) -> Blurred:
    """`count` crops of each seed."""
    parts = [locally_blurred("test", count, seed, size=IMAGE_SIZE, shares=TEST_SHARES) for seed in SEEDS]
    images, sharp, mask, sources = zip(*parts, strict=True)
    return Blurred(torch.cat(images), torch.cat(sharp), torch.cat(mask), tuple(chain.from_iterable(sources)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares methods on the shipped restoration network."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.deblur_quality", description=main.__doc__)
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--weights", help="of adawpt (default: the shipped ones)")
    parser.add_argument("--samples", type=int, default=40, help="crops of each seed (default: %(default)s)")
    parser.add_argument("--output", help=".md, .json or .csv")
    options = parser.parse_args(arguments)
    crops = held_out(options.samples)
    rows = compare(deblur_swin(), crops, flops=options.flops, weights=options.weights)
    table = Table(rows, {"crops": len(crops.images), "size": IMAGE_SIZE, **environment("cpu")})
    print(table.to_markdown())
    if options.output:
        table.save(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
