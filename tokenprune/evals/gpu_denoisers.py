"""Forwards of denoisers at their real sizes, patched against unpatched, fused attention on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

import tokenprune
from tokenprune.denoisers.run import UNKNOWN_STEPS
from tokenprune.evals.arms import budget_label
from tokenprune.evals.bench import ratio_cells
from tokenprune.evals.cases import Case
from tokenprune.evals.real_denoisers import Inputs, created_on, first_steps, flux, later_steps, pixart, sd3, sd15, sdxl
from tokenprune.evals.region_speed import square
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row
from tokenprune.evals.throughput import measure, peak_memory

MASK = 0.25  # share of the picture


@dataclass(frozen=True)
class Way:
    """A method with its options, as a row has it. first: whether the first step of a run is timed, and not a later
    one."""

    method: str
    options: Mapping[str, Any]
    label: str
    first: bool = False


@dataclass(frozen=True)
class Denoiser:
    """make: (pixels, batch) -> (model, inputs). batch: 2 with guidance. noisiest: the timestep of pure noise."""

    make: Callable[[int, int], tuple[nn.Module, Inputs]]
    pixels: int
    batch: int
    ways: tuple[Way, ...]
    noisiest: float = 1000.0


def way(method: str, *, first: bool = False, **options: Any) -> Way:
    """A method whose options are its label."""
    shown = {name: value for name, value in options.items() if name != "steps"}
    return Way(method, options, budget_label(shown), first)


def at_budget(flops: float) -> tuple[Way, ...]:
    """Given tokens, the same with their choice, and an inpainting mask. Every step is reduced alike, so that one stands
    for the run."""
    return way("uniform", flops=flops, steps={}), way("at_edm", flops=flops, steps={}), REGION


MASKED = {"mask": square(64, MASK), "ring": 1, "dense_steps": (0,)}
REGION = Way("region", MASKED, f"mask={MASK}")
FIRST_OF_REGION = Way("region", MASKED, f"mask={MASK}", first=True)
MERGING = (way("tomesd", ratio=0.5), way("tomesd", ratio=0.5, merge_crossattn=True, merge_mlp=True))
DENOISERS: dict[str, Denoiser] = {
    "SDXL": Denoiser(sdxl, 1024, 2, (*at_budget(0.6), *MERGING, FIRST_OF_REGION)),
    "FLUX.1-dev": Denoiser(flux, 1024, 1, (*at_budget(0.6), FIRST_OF_REGION), noisiest=1.0),
    "SD 1.5": Denoiser(sd15, 512, 2, at_budget(0.8) + MERGING),
    "SD 1.5 at 1024": Denoiser(sd15, 1024, 2, at_budget(0.7) + MERGING),
    "SD3 medium": Denoiser(sd3, 1024, 2, at_budget(0.6)),
    "PixArt XL/2": Denoiser(pixart, 1024, 2, at_budget(0.6) + MERGING),
}
COMPILED = {"FLUX.1-dev": "at_edm"}


def denoiser_cases(device: torch.device, dtype: torch.dtype, *, rounds: int = 20, attempts: int = 2) -> Iterator[Case]:
    """A case for each of DENOISERS and its ways, with the columns of `denoiser_row`."""
    for name, denoiser in DENOISERS.items():
        made = cache(partial(_made, denoiser, device, dtype))
        for one in denoiser.ways:
            yield Case(_labels(name, denoiser, one, dtype), partial(_row, made, denoiser, one, rounds, attempts))


def compiled_denoiser_cases(device: torch.device, dtype: torch.dtype, *, rounds: int = 20) -> Iterator[Case]:
    """The ways of COMPILED, all blocks compiled on both sides (`compile_repeated_blocks`)."""
    for name, method in COMPILED.items():
        denoiser = DENOISERS[name]
        made = cache(partial(_made, denoiser, device, dtype))
        one = next(one for one in denoiser.ways if one.method == method)
        labels = {**_labels(name, denoiser, one, dtype), "compiled": "blocks"}
        yield Case(labels, partial(_row, made, denoiser, one, rounds, 1, compile_blocks=True))


def denoiser_row(
    model: nn.Module,
    inputs: Inputs,
    one: Way,
    *,
    noisiest: float = 1000.0,
    rounds: int = 20,
    attempts: int = 2,
    compile_blocks: bool = False,
) -> Row:
    """A forward of `model` with a patch against one without, by `tokenprune.evals.throughput.measure`.

    Columns: `ms` and `unpatched_ms` of a forward (medians), `speedup` with its interval, `promised` (by the
    multiply-adds of this step), `control`, `trusted`, peak memory in MiB where CUDA measures it. `model` is left as it
    is.
    """
    drive = partial(first_steps if one.first else later_steps, inputs=inputs, noisiest=noisiest)
    models: list[Any] = [shared_copy(model) for _ in range(3)]
    reference = drive(models[0])
    device = next(model.parameters()).device
    with torch.inference_mode():
        reference()
        alone = peak_memory(reference, device)  # before there is a patch, which may keep something over steps
        tokenprune.patch(models[1], one.method, **one.options)
        if compile_blocks:
            torch._dynamo.reset()
            for each in models:
                each.compile_repeated_blocks(fullgraph=True)
        arms = [reference, drive(models[1]), drive(models[2])]
        warmup = 3 if compile_blocks else 1
        timing = measure(*arms, rounds=rounds, warmup=warmup, attempts=attempts, device=device)
    ratio = _step_ratio(one, tokenprune.report(models[1]).to_dict()["flops_ratio"])
    row: Row = {"ms": 1e3 * timing.seconds_patched, "unpatched_ms": 1e3 * timing.seconds, "promised": 1 / ratio}
    row |= ratio_cells(timing)
    if alone is not None:
        row["unpatched_peak_mb"] = alone / 2**20
    return row


def _step_ratio(one: Way, of_run: float) -> float:
    """The multiply-adds of the timed step over the unpatched one's. of_run: those of a whole run."""
    if one.method != "region":
        return of_run
    return 1.0 if one.first else (UNKNOWN_STEPS * of_run - 1) / (UNKNOWN_STEPS - 1)


def _made(denoiser: Denoiser, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    with created_on(device, dtype):
        model, inputs = denoiser.make(denoiser.pixels, denoiser.batch)
    return model.to(device, dtype).eval(), inputs


def _labels(name: str, denoiser: Denoiser, one: Way, dtype: torch.dtype) -> Row:
    row: Row = {"model": name, "pixels": denoiser.pixels, "batch": denoiser.batch}
    row |= {"dtype": str(dtype).removeprefix("torch."), "method": one.method, "budget": one.label}
    return row | {"step": "first" if one.first else "any but the first" if one.method == "region" else "any"}


def _row(
    made: Callable[[], tuple[nn.Module, Inputs]],
    denoiser: Denoiser,
    one: Way,
    rounds: int,
    attempts: int,
    *,
    compile_blocks: bool = False,
) -> list[Row]:
    model, inputs = made()
    return [
        denoiser_row(
            model,
            inputs,
            one,
            noisiest=denoiser.noisiest,
            rounds=rounds,
            attempts=attempts,
            compile_blocks=compile_blocks,
        )
    ]
