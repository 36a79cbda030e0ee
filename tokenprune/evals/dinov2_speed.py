"""What flops=0.6 really saves in a DINOv2 ViT-S/14 at 257 tokens, and what choosing the tokens costs.

    python -m tokenprune.evals.dinov2_speed

The weights decide which tokens go and not how long that takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.bench import timing_cells
from tokenprune.evals.overhead import overhead_cells
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import measure

METHODS: Mapping[str, Mapping[str, Any]] = {
    "top_k": {},
    "tome": {},
    "zero_tprune": {"places": (1, 3, 6, 9)},  # 30 iterations at the first, 5 at the next two and 1 at the last
}


def speed_table(
    model: nn.Module,
    images: Tensor,
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    *,
    flops: float = 0.6,
    rounds: int = 20,
    attempts: int = 3,
    compile_mode: str | None = None,
) -> Table:
    """A row for each of `methods` (name: options) at `flops` on images [B, C, H, W].

    Columns: `promised` (1 / FLOPs ratio), `kept_promise` (the speed-up over it), those of
    `tokenprune.evals.bench.timing_cells`, and from the profile of the eager model `overhead` of the unpatched forward's
    time with its parts (`tokenprune.evals.overhead`). With a
    `compile_mode` of torch.compile all are compiled, each as one graph, and nothing is profiled.
    """
    rows: list[Row] = []
    for name, options in methods.items():
        patched = tokenprune.patch(shared_copy(model), name, flops=flops, **options)
        promised = 1 / tokenprune.report(patched).to_dict()["flops_ratio"]
        runs = [shared_copy(model), patched, shared_copy(model)]
        if compile_mode is not None:
            torch._dynamo.reset()
            for module in runs:
                module.compile(fullgraph=True, mode=compile_mode)
        with torch.inference_mode():
            arms = [partial(module, images) for module in runs]
            timing = measure(*arms, rounds=rounds, attempts=attempts, device=images.device)
        row: Row = {"method": name, "promised": promised, "kept_promise": timing.speedup.estimate / promised}
        row |= timing_cells(timing, len(images))
        if compile_mode is None:
            row |= overhead_cells(model, patched, images, rounds=rounds)
        rows.append(row)
    return Table(rows, {"batch": len(images), "compiled": compile_mode, **environment(images.device, images.dtype)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and one of compiled models with --compile."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.dinov2_speed", description=main.__doc__)
    parser.add_argument("--method", action="append", choices=list(METHODS), help="repeatable (default: all)")
    parser.add_argument("--flops", type=float, default=0.6, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="of a quiet measurement (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compiled against compiled")
    options = parser.parse_args(arguments)
    from tokenprune.evals.dinov2 import dinov2_small

    images = torch.randn(options.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    methods = {name: METHODS[name] for name in options.method or METHODS}
    table = speed_table(
        dinov2_small(),
        images,
        methods,
        flops=options.flops,
        rounds=options.rounds,
        attempts=options.attempts,
        compile_mode="default" if options.compile else None,
    )
    print(table.to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
