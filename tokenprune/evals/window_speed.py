"""How much of what a patch saves in multiply-adds a model of windows saves in time, with random weights at a real size.

    python -m tokenprune.evals.window_speed
    python -m tokenprune.evals.window_speed --size 224 --batch-size 8 --method top_k --method tome --flops 0.7

The first leaves out windows of a Swin-T by `sparsevit`, the second runs methods for tokens within the windows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import measure_together

SPARSEVIT: Mapping[str, tuple[str, dict[str, Any]]] = {
    "published ratios": ("sparsevit", {}),
    "60% of the windows left out": ("sparsevit", {"ratios": (0.6, 0.6, 0.6, 0.6)}),
}


def compare(
    model: nn.Module,
    images: Tensor,
    *,
    patches: Mapping[str, tuple[str, dict[str, Any]]] = SPARSEVIT,
    rounds: int = 26,
) -> Table:
    """Time of a forward of `model` under each of `patches` {name: (method, its budget)} on images [B, C, H, W].

    Columns: `flops` (share of the multiply-adds), `speedup` (median of per-round ratios, with a 95% bootstrap
    interval), `of_promise` (that times `flops`: 1 where time falls as multiply-adds do), `control` (the unpatched model
    against itself).
    """
    patched = [tokenprune.patch(shared_copy(model), method, **budget) for method, budget in patches.values()]
    arms = [partial(_run, arm, images) for arm in (model, *patched, shared_copy(model))]
    found = measure_together(arms, rounds)[1:-1]
    rows: list[Row] = []
    for name, one, arm in zip(patches, found, patched, strict=True):
        flops = tokenprune.report(arm).to_dict()["flops_ratio"]
        rows.append({"patch": name, "flops": flops, **one.cells(), "of_promise": one.speedup.estimate * flops})
    return Table(rows, {"batch": len(images), **environment(images.device, images.dtype)})


def _run(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table: of sparsevit, or of each --method at each --flops."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.window_speed", description=main.__doc__)
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="of timm (default: %(default)s)")
    parser.add_argument("--size", type=int, default=672, help="of the images, in pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--method", action="append", help="repeatable (default: sparsevit at its ratios)")
    parser.add_argument("--flops", action="append", type=float, help="of a --method; repeatable (default: 0.7)")
    parser.add_argument("--rounds", type=int, default=26, help="at least 20 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = timm.create_model(options.model, img_size=options.size).eval()
    shape = (options.batch_size, 3, options.size, options.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    asked = {
        f"{method}, flops={flops:g}": (method, {"flops": flops})
        for flops in options.flops or [0.7]
        for method in options.method or []
    }
    print(compare(model, images, patches=asked or SPARSEVIT, rounds=options.rounds).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
