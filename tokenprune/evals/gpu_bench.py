"""What only a GPU can tell: operations, vision transformers, denoisers and a LLaVA at real sizes, on CUDA.

python -m tokenprune.evals.gpu_bench --output bench-output --tables vits,denoisers

All weights are random; they decide which tokens go and not how long that takes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from tokenprune.evals.cases import Case, run_cases
from tokenprune.evals.gpu_denoisers import compiled_denoiser_cases, denoiser_cases
from tokenprune.evals.gpu_lvlm import lvlm_cases
from tokenprune.evals.gpu_vits import compiled_vit_cases, vit_cases
from tokenprune.evals.kernel_bench import TOKENS, bench_kernels
from tokenprune.evals.kernel_cases import CASES
from tokenprune.evals.table import Row, environment, version

DTYPES = ("bfloat16", "float16", "float32")


def kernel_cases(
    device: torch.device, dtypes: Sequence[torch.dtype], *, tokens: Sequence[int] = TOKENS, rounds: int = 20
) -> Iterator[Case]:
    """`bench_kernels` in several dtypes, each operation at each number of tokens a case."""
    for dtype, operation, count in itertools.product(dtypes, CASES, tokens):
        labels: Row = {"dtype": str(dtype).removeprefix("torch."), "op": operation, "tokens": count}
        yield Case(labels, partial(_kernel_rows, operation, count, device, dtype, rounds))


def _kernel_rows(operation: str, count: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    return bench_kernels([operation], [count], device=device, dtype=dtype, rounds=rounds).rows


def table_cases(
    device: torch.device, dtypes: Sequence[torch.dtype], tokens: Sequence[int]
) -> dict[str, Callable[[], Iterator[Case]]]:
    """{table: its cases}. dtypes: none for each table's own."""
    chosen = list(dtypes) or [torch.bfloat16]
    every = list(dtypes) or [getattr(torch, name) for name in DTYPES]
    return {
        "kernels": lambda: kernel_cases(device, every, tokens=tokens),
        "vits": lambda: vit_cases(device, chosen),
        "denoisers": lambda: itertools.chain.from_iterable(denoiser_cases(device, dtype) for dtype in chosen),
        "lvlm": lambda: itertools.chain.from_iterable(lvlm_cases(device, dtype) for dtype in chosen),
        "compiled": lambda: itertools.chain(
            compiled_vit_cases(device, chosen), *(compiled_denoiser_cases(device, dtype) for dtype in chosen)
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes gpu-<table>.json and .md into the output folder, each anew behind every row. Fails where there is no
    GPU."""
    device = torch.device("cuda")
    names = list(table_cases(device, [], TOKENS))
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.gpu_bench", description=main.__doc__)
    parser.add_argument("--output", default="bench-output", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--tables", default=",".join(names), help="with commas between them (default: %(default)s)")
    parser.add_argument("--limit-seconds", type=float, help="of each table: when they are over, no row is begun")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: the kernels all)")
    parser.add_argument("--tokens", type=int, action="append", help=f"of the operations, repeatable: {TOKENS}")
    parser.add_argument("--only", action="append", metavar="TEXT", help="rows with this in a label; all of several")
    options = parser.parse_args(arguments)
    wanted = options.tables.split(",")
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--tables: there is no {', '.join(unknown)}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        print("bench-gpu: torch finds no CUDA GPU here, and nothing was measured; `make bench-kernels` runs on a CPU")
        return 1
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = [getattr(torch, name) for name in options.dtype or ()]
    cases = table_cases(device, dtypes, options.tokens or TOKENS)
    for name in wanted:
        chosen = (case for case in cases[name]() if _is_meant(case, options.only or ()))
        table = run_cases(chosen, conditions(device), folder / f"gpu-{name}", seconds=options.limit_seconds)
        print(table.to_text() if table.rows else f"gpu-{name}: no row has {options.only} in its labels", flush=True)
    return 0


def conditions(device: torch.device) -> Row:
    """The environment of a table whose dtypes are a column, with the hosts' versions."""
    found = {name: value for name, value in environment(device).items() if name != "dtype"}
    return found | {name: version(name) for name in ("triton", "diffusers", "transformers")}


def _is_meant(case: Case, texts: Sequence[str]) -> bool:
    labels = " | ".join(str(value) for value in case.labels.values())
    return all(text in labels for text in texts)


if __name__ == "__main__":
    sys.exit(main())
