"""Time and peak memory of every operation of `tokenprune.kernels` over the number of tokens.

python -m tokenprune.evals.kernel_bench --output bench-output
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from tokenprune.evals.kernel_cases import CASES, Case
from tokenprune.evals.kernel_plot import plot_kernels
from tokenprune.evals.memory import peak_extra_memory
from tokenprune.evals.progress import progress
from tokenprune.evals.side_by_side import side_by_side
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import sample

TOKENS = (64, 256, 1024, 4096, 16384)
QUICK = (64, 128)


def bench_kernels(
    operations: Sequence[str] = tuple(CASES),
    tokens: Sequence[int] = TOKENS,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 20,
    sample_seconds: float = 0.02,
    longest: float = 3.0,
    attempts: int = 3,
    show_progress: bool = False,
) -> Table:
    """A row for each operation, number of tokens and way of computing it (`tokenprune.evals.kernel_cases`).

    The ways of a case are timed in turn by `tokenprune.evals.side_by_side`. One that would not fit into memory, or of
    which a call takes more than `longest` seconds, has no numbers, and its note says why; one that took ten times that
    is not called with more tokens.

    Columns: `ms` of a call (median), `over_torch` and `over_naive` (median of per-round ratios of time with a 95%
    bootstrap interval, below 1 is faster), `extra_mb` (most MiB alive at once during the call and not before), `chosen`
    (the way that the dispatcher takes), `control` (torch over itself; where it is not timed, another way) and `trusted`
    (within 2% of 1).
    """
    device = torch.device(device)
    rows: list[Row] = []
    with torch.inference_mode():
        for operation in operations:
            slow: dict[tuple[str, str], str] = {}
            for count in progress(sorted(tokens), operation, show=show_progress):
                for case in CASES[operation](count, device, dtype):
                    rows += _rows(case, device, rounds, sample_seconds, longest, attempts, slow)
    return Table(rows, environment(device, dtype))


def _rows(
    case: Case,
    device: torch.device,
    rounds: int,
    sample_seconds: float,
    longest: float,
    attempts: int,
    slow: dict[tuple[str, str], str],
) -> list[Row]:
    """slow: ways, by (operation, name), that are not to be called any more, and why; those of this case are added."""
    notes = {}
    for name, way in case.ways.items():
        if (case.op, name) in slow:
            notes[name] = slow[case.op, name]
        elif name == "naive" and case.naive_bytes > _free_bytes(device):
            notes[name] = f"its maps of {case.naive_bytes / 2**30:.1f} GiB do not fit into memory"
        elif (once := sample(way, 1, device)) > longest:
            # The first call of all may have waited for something to be loaded, or compiled.
            once = min(once, sample(way, 1, device))
            if once > longest:
                notes[name] = f"a call takes {once:.2g} s"
            if once > 10 * longest:
                slow[case.op, name] = f"a call with {case.tokens} tokens takes {once:.2g} s"
    timed = {name: way for name, way in case.ways.items() if name not in notes}
    found = None
    if timed:
        first = "torch" if "torch" in timed else next(iter(timed))
        found = side_by_side(
            timed, first, rounds=rounds, sample_seconds=sample_seconds, attempts=attempts, device=device
        )
    rows: list[Row] = []
    for name, way in case.ways.items():
        row: Row = {"op": case.op, "tokens": case.tokens, "shape": case.shape, "way": name}
        row["chosen"] = name == case.chosen
        if found is not None and name in timed:
            row["ms"] = 1000 * found.median(name)
            for other in ("torch", "naive"):
                if other in timed:
                    ratio = found.ratio(name, other)
                    row |= interval_cells(f"over_{other}", ratio)
            row |= {"extra_mb": peak_extra_memory(way, device) / 2**20}
        if found is not None:
            row |= {"control": found.control, "trusted": found.trusted}
        rows.append({**row, "note": notes.get(name)})
    return rows


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes kernels.json, kernels.md and kernels.png into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.kernel_bench", description=main.__doc__)
    parser.add_argument("--output", default="bench-output", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--op", action="append", choices=list(CASES), help="repeatable (default: all)")
    parser.add_argument("--tokens", type=int, action="append", help=f"repeatable (default: {TOKENS})")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    parser.add_argument("--longest", type=float, help="seconds of a call that is timed (default: 3, quick: 0.1)")
    parser.add_argument("--quick", action="store_true", help=f"short samples at {QUICK} tokens, to try it out")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench = partial(bench_kernels, sample_seconds=0.0, attempts=1) if options.quick else bench_kernels
    table = bench(
        options.op or tuple(CASES),
        options.tokens or (QUICK if options.quick else TOKENS),
        device=options.device,
        dtype=getattr(torch, options.dtype),
        longest=options.longest or (0.1 if options.quick else 3.0),
        show_progress=True,
    )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".md"):
        table.save(folder / f"kernels{suffix}")
    plot_kernels(table, folder / "kernels.png")
    print(table.to_text())
    print(f"written to {folder}: kernels.json, kernels.md, kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
