"""Vision transformers with random weights, patched against unpatched, eager and compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from tokenprune.evals.arms import build_arms
from tokenprune.evals.bench import arm_row
from tokenprune.evals.cases import Case
from tokenprune.evals.dinov2_speed import speed_table
from tokenprune.evals.real_denoisers import created_on
from tokenprune.evals.table import Row
from tokenprune.kernels.backends import use_backend

METHODS = ("top_k", "tome", "zero_tprune")
FLOPS = 0.6


@dataclass(frozen=True)
class Vit:
    """A model of timm on square images. backends: of the kernels ("default": as their dispatchers choose)."""

    model: str
    pixels: int
    batches: tuple[int, ...]
    backends: tuple[str, ...] = ("default",)


ALL_BACKENDS = ("default", "eager", "triton")
VITS = (
    Vit("vit_large_patch14_dinov2", 518, (1, 16)),  # 1,370 tokens
    Vit("vit_base_patch16_224", 224, (64,)),  # 197
    Vit("vit_small_patch14_dinov2", 518, (1, 16), ALL_BACKENDS),
    Vit("vit_small_patch14_dinov2", 224, (1, 16), ALL_BACKENDS),  # 257
)
# "reduce-overhead" launches a captured graph, so that the host's time is gone from both sides.
MODES = ("reduce-overhead", "default")
COMPILED = (Vit("vit_base_patch16_224", 224, (64, 1)), Vit("vit_large_patch14_dinov2", 518, (1,)))


def vit_cases(device: torch.device, dtypes: Sequence[torch.dtype], *, rounds: int = 20) -> Iterator[Case]:
    """METHODS at 60% of the FLOPs, with the columns of `tokenprune.evals.bench.bench`."""
    for dtype in dtypes:
        for vit in VITS:
            made = cache(partial(_made, vit, device, dtype))
            for batch in vit.batches:
                for backend in vit.backends:
                    for method in METHODS:
                        labels = {**_labels(vit, batch, dtype), "kernels": backend, "method": method}
                        yield Case(labels, partial(_eager, made, method, batch, backend, rounds))


def compiled_vit_cases(device: torch.device, dtypes: Sequence[torch.dtype], *, rounds: int = 20) -> Iterator[Case]:
    """METHODS on COMPILED, compiled against compiled, each as one graph (`tokenprune.evals.dinov2_speed`)."""
    for mode, dtype, vit in itertools.product(MODES, dtypes, COMPILED):
        made = cache(partial(_made, vit, device, dtype))
        for batch, method in itertools.product(vit.batches, METHODS):
            labels = {**_labels(vit, batch, dtype), "method": method, "compiled": mode}
            yield Case(labels, partial(_compiled, made, method, batch, mode, rounds))


def _made(vit: Vit, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    import timm

    torch.manual_seed(0)
    with created_on(device, dtype):
        model = timm.create_model(vit.model, img_size=vit.pixels)
        images = torch.randn(max(vit.batches), 3, vit.pixels, vit.pixels)
    return model.to(device, dtype).eval(), images


def _labels(vit: Vit, batch: int, dtype: torch.dtype) -> Row:
    return {"model": vit.model, "pixels": vit.pixels, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}


def _eager(
    made: Callable[[], tuple[nn.Module, Tensor]], method: str, batch: int, backend: str, rounds: int
) -> list[Row]:
    model, images = made()
    with nullcontext() if backend == "default" else use_backend(backend):
        base, arm = build_arms(model, images[:batch], [method], [{"flops": FLOPS}], baselines=False)
        return [arm_row(arm, base, images[:batch], rounds=rounds)]


def _compiled(
    made: Callable[[], tuple[nn.Module, Tensor]], method: str, batch: int, mode: str, rounds: int
) -> list[Row]:
    model, images = made()
    table = speed_table(model, images[:batch], {method: {}}, flops=FLOPS, rounds=rounds, attempts=1, compile_mode=mode)
    return table.rows
