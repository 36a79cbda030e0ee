"""What only a GPU can tell: every operation, and patched vision transformers, on CUDA, eager against Triton.

python -m tokenprune.evals.gpu_bench --output bench-output
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from tokenprune.evals.bench import bench
from tokenprune.evals.kernel_bench import TOKENS, bench_kernels
from tokenprune.evals.table import Row, Table, environment
from tokenprune.kernels.backends import use_backend

DTYPES = ("float16", "bfloat16", "float32")
MODEL = "vit_small_patch14_dinov2"
METHODS = ("top_k", "tome", "zero_tprune")
SIZES = (224, 518)  # pixels: 257 and 1,370 tokens
BATCHES = (1, 16)


def bench_gpu_kernels(
    device: torch.device, *, dtypes: Sequence[str] = DTYPES, tokens: Sequence[int] = TOKENS, rounds: int = 20
) -> Table:
    """`bench_kernels` on a device in several dtypes, which are a column."""
    rows: list[Row] = []
    for dtype in dtypes:
        kind = getattr(torch, dtype)
        table = bench_kernels(tokens=tokens, device=device, dtype=kind, rounds=rounds, show_progress=True)
        rows += [{"dtype": dtype, **row} for row in table.rows]
    return Table(rows, _conditions(device))


def bench_gpu_models(
    device: torch.device,
    *,
    model: str = MODEL,
    dtypes: Sequence[str] = DTYPES,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    backends: Sequence[str] = ("default", "eager", "triton"),
    rounds: int = 20,
) -> Table:
    """`bench` of METHODS at 60% of the FLOPs with random weights on square images of these sizes, under each backend of
    the kernels ("default": as their dispatchers choose)."""
    import timm

    rows: list[Row] = []
    for dtype in dtypes:
        for size in sizes:
            vit = timm.create_model(model, img_size=size).to(device, getattr(torch, dtype))
            x = torch.randn(max(batches), 3, size, size, generator=torch.Generator().manual_seed(0))
            for backend in backends:
                with nullcontext() if backend == "default" else use_backend(backend):
                    table = bench(
                        vit,
                        x.to(device, getattr(torch, dtype)),
                        METHODS,
                        batch_sizes=batches,
                        rounds=rounds,
                        baselines=False,
                        show_progress=True,
                    )
                rows += [{"dtype": dtype, "pixels": size, "kernels": backend, **row} for row in table.rows]
    return Table(rows, {**_conditions(device), "model": model})


def _conditions(device: torch.device) -> Row:
    """The environment of a table whose dtypes are a column."""
    return {name: value for name, value in environment(device).items() if name != "dtype"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes gpu-kernels and gpu-models, each .json and .md, into the output folder. Fails where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.gpu_bench", description=main.__doc__)
    parser.add_argument("--output", default="bench-output", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: all)")
    parser.add_argument("--tokens", type=int, action="append", help=f"of the operations, repeatable: {TOKENS}")
    parser.add_argument("--model", default=MODEL, help="a vision transformer of timm (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu: torch finds no CUDA GPU here, and nothing was measured; `make bench-kernels` runs on a CPU")
        return 1
    device, folder = torch.device("cuda"), Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = options.dtype or DTYPES
    tables = {
        "gpu-kernels": bench_gpu_kernels(device, dtypes=dtypes, tokens=options.tokens or TOKENS),
        "gpu-models": bench_gpu_models(device, model=options.model, dtypes=dtypes),
    }
    for name, table in tables.items():
        for suffix in (".json", ".md"):
            table.save(folder / f"{name}{suffix}")
        print(table.to_text())
    print(f"written to {folder}: gpu-kernels and gpu-models, each .json and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
