"""`tokenprune doctor`: what is installed, what of it works together, and which kernels run here and why."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from tokenprune.evals.commands import emit, set_machine
from tokenprune.evals.table import Row, Table, environment, version
from tokenprune.kernels import attention_mass, class_attention, matching, merge
from tokenprune.kernels.backends import Choice
from tokenprune.kernels.packed_attention.dispatch import choose_backend
from tokenprune.latency import tables_folder

# What a user installs for it: the oldest release that works, and what for.
LIBRARIES = {
    "torch": ("2.6", "everything"),
    "timm": ("1.0.16", "timm's image models, and the evaluations"),
    "transformers": ("5.23", "image towers and vision-language models"),
    "diffusers": ("0.35", "denoisers"),
    "accelerate": ("1.0", "training what a method learns"),
    "safetensors": ("0.4", "weights, learned parts"),
    "triton": (None, "kernels of our own on a GPU"),
    "xformers": (None, "attention over ragged batches on a GPU"),
    "flash-attn": (None, "attention over ragged batches on a GPU"),
}
COMPILED = "2.8"
SIZES = (257, 4096)


def run_doctor(options: argparse.Namespace) -> int:
    """0 where nothing is wrong, else 1."""
    set_machine(options)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    rows = [*libraries(), *host(device), *kernels(device, dtype)]
    emit(Table(rows, environment(device, dtype)), options)
    return 1 if any(row["state"] == "wrong" for row in rows) else 0


def libraries() -> Iterator[Row]:
    """Each library, its version, and whether that is new enough."""
    for name, (oldest, use) in LIBRARIES.items():
        found = version(name)
        if found is None:
            yield _row(name, "not installed", "missing", f"needed for {use}")
        elif oldest is not None and _older(found, oldest):
            yield _row(name, found, "wrong", f"older than {oldest}: pip install -U {name}")
        else:
            yield _row(name, found, "fine", use)
    if _older(torch.__version__, COMPILED):
        yield _row("torch.compile", torch.__version__, "wrong", f"patched models compile from torch {COMPILED} on")


def host(device: torch.device) -> Iterator[Row]:
    """The device, what is measured on it, and what makes it slow."""
    yield _row("python", platform.python_version(), "fine", platform.platform())
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        told = "bfloat16 and flash attention" if major >= 8 else "no bfloat16, no flash attention over ragged batches"
        yield _row("GPU", torch.cuda.get_device_name(device), "fine", f"compute capability {major}.{minor}: {told}")
    elif torch.cuda.is_available():
        yield _row("GPU", torch.cuda.get_device_name(0), "unused", "--device cuda asks for it")
    else:
        yield _row("GPU", "none", "missing", f"a CPU with {torch.get_num_threads()} threads")
    folder = tables_folder()
    tables = len(list(folder.glob("*.json"))) if folder.is_dir() else 0
    why = f"in {folder}" if tables else "tokenprune bench MODEL --save-profile makes one, for require_speedup=True"
    yield _row("latency tables", str(tables), "fine" if tables else "missing", why)


def kernels(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Which implementation each operation takes for tensors of that dtype there, and why."""
    for tokens in SIZES:
        heads = torch.empty(1, 8, tokens, 64, device=device, dtype=dtype)
        flat = heads.view(1, tokens, 512)
        for iterations in (1, 30):
            name = f"attention_mass, {tokens} tokens, {iterations} iteration{'s' if iterations > 1 else ''}"
            yield _kernel(name, attention_mass.choose(heads, heads, iterations=iterations))
        yield _kernel(f"cosine_match, {tokens} tokens", matching.choose(flat, flat))
    yield _kernel("class_attention", class_attention.choose(heads, heads))
    sizes: Tensor = flat.new_ones(1, tokens, dtype=torch.float32)
    yield _kernel("merge", merge.choose_merge(flat, sizes))
    yield _kernel("gather", merge.choose_gather(flat))
    rows = heads[0].transpose(0, 1)
    yield _kernel("packed_attention", choose_backend(rows, rows))


def _kernel(name: str, choice: Choice) -> Row:
    return _row(name, choice.backend, "fine", choice.reason)


def _row(what: str, found: str, state: str, why: str) -> Row:
    return {"what": what, "found": found, "state": state, "why": why}


def _older(found: str, than: str) -> bool:
    """Whether a version is below another by its leading numbers: "2.10.1+cpu" is not older than "2.8"."""

    def numbers(text: str) -> list[int]:
        parts = text.split("+")[0].split(".")
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts[:3]]

    return numbers(found) < numbers(than)
