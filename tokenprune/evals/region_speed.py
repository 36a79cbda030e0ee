"""What `region` costs against the mask's share: whole denoising runs, the dense step that fills the caches included.

    python -m tokenprune.evals.region_speed

The weights are random; which tokens are computed is the mask's doing.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.denoisers.over_steps import at_steps
from tokenprune.evals.digits_denoisers import untrained
from tokenprune.evals.plot import plot_time_against_mask
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import Interval
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import Relative, measure_together
from tokenprune.methods.region import EARLY

SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
STEPS = 20
MASK = 0.1
"""Share of the mask where there is one alone."""

FIRST = (0,)
"""The only dense step is the one that fills what is kept."""

EARLY_STEPS = 50
"""Steps of the runs that compute everything at `region`'s own choice of steps."""

Draw = Callable[[nn.Module, Tensor, int], object]


def square(side: int, share: float) -> Tensor:
    """A mask [side, side] of zeros with a square of ones in the middle, `share` of it."""
    width = max(1, round(side * share**0.5))
    mask = torch.zeros(side, side)
    start = (side - width) // 2
    mask[start : start + width, start : start + width] = 1
    return mask


def region_table(
    model: nn.Module,
    draw: Draw,
    latents: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    steps: int = STEPS,
    dense_steps: Sequence[float] = FIRST,
    rounds: int = 20,
) -> Table:
    """Runs of `steps` forwards on latents [B, C, H, W], with masks and a ring of one token against none, all in turn.

    draw: runs the model on the latents for one step of [steps - 1 .. 0]. dense_steps: see `region`; shares are of a run
    of `denoisers.run.UNKNOWN_STEPS`. Columns: `mask` (share of the area), `time` of the whole run over the unpatched
    one's with a 95% interval, `control`, `trusted`.
    """
    models = [model, *(masked(model, latents, share, dense_steps) for share in shares), shared_copy(model)]
    with torch.inference_mode():
        timings = measure_together([partial(_run, one, draw, latents, steps) for one in models], rounds)
    rows: list[Row] = []
    for share, timing in zip(shares, timings[1:-1], strict=True):
        rows.append({"mask": share, **_time("time", timing.speedup), **_trust(timing)})
    told = " ".join(map(str, dense_steps))
    return Table(rows, {"batch": len(latents), "steps": steps, "dense steps": told, **environment()})


def step_table(model: nn.Module, draw: Draw, latents: Tensor, share: float, *, rounds: int = 20) -> Table:
    """The same for a model that is too large for whole runs: one step of each kind.

    Columns: `dense step` and `step`, time of one that fills what is kept and of one that uses it over an unpatched
    one's, and what follows for whole runs: `time` for STEPS of which the first is dense, `early` for EARLY_STEPS with
    `region`'s own choice of dense steps.
    """
    later, earlier = itertools.count(1), itertools.count(-1, -1)
    dense, masks = masked(model, latents, share, FIRST), masked(model, latents, share, FIRST)
    with torch.inference_mode():
        draw(masks, latents, 0)
        first, step, _ = measure_together(
            [
                partial(draw, model, latents, 0),
                # A step that rises begins a new run, and its first one computes everything.
                lambda: draw(dense, latents, next(later)),
                lambda: draw(masks, latents, next(earlier)),
                partial(draw, shared_copy(model), latents, 0),
            ],
            rounds,
        )[1:]
    row: Row = {"mask": share, **_time("dense step", first.speedup), **_time("step", step.speedup)}
    for name, steps, named in (("time", STEPS, FIRST), ("early", EARLY_STEPS, EARLY)):
        whole = sum(at_steps(named)(number, steps) for number in range(steps)) / steps
        row[name] = whole / first.speedup.estimate + (1 - whole) / step.speedup.estimate
    return Table([row | _trust(step)], {"batch": len(latents), **environment()})


def masked(model: nn.Module, latents: Tensor, share: float, dense_steps: Sequence[float]) -> nn.Module:
    """A copy of the model with `region` on a square in the middle of the latents, and a ring of one token."""
    copy = shared_copy(model)
    mask = square(latents.shape[-1], share)
    tokenprune.patch(copy, "region", mask=mask, ring=1, dense_steps=tuple(dense_steps))
    return copy


def _time(name: str, speedup: Interval) -> Row:
    return interval_cells(name, Interval(1 / speedup.estimate, 1 / speedup.high, 1 / speedup.low))


def _trust(timing: Relative) -> Row:
    cells = timing.cells()
    return {"control": cells["control"], "trusted": cells["trusted"]}


def _run(model: nn.Module, draw: Draw, latents: Tensor, steps: int) -> None:
    for step in range(steps - 1, -1, -1):
        draw(model, latents, step)


def digits(model: nn.Module, latents: Tensor, step: int) -> object:
    """A step of the small DiT, all digits in turn."""
    return model(latents, timestep=torch.full((len(latents),), step), class_labels=torch.arange(len(latents)) % 10)


def dit_xl(blocks: int = 2) -> nn.Module:
    """A DiT-XL/2 at 512 pixels (1,024 tokens of width 1,152) of so many blocks."""
    from diffusers import DiTTransformer2DModel

    model: nn.Module = DiTTransformer2DModel(num_layers=blocks, sample_size=64)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables of the small DiT at batch 16, with one dense step and with `region`'s own choice of them, and one
    of two blocks of a DiT-XL/2."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.region_speed", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    tables = ["small", "early", "large"]
    parser.add_argument("--table", action="append", choices=tables, help="repeatable (default: all)")
    parser.add_argument("--plot", metavar="FILE", help="where to draw time against the mask's share (.png, .svg)")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(16, 3, 36, 36, generator=generator), torch.randn(1, 4, 64, 64, generator=generator)
    if "small" in (options.table or tables):
        table = region_table(untrained("dit-digits"), digits, small, rounds=options.rounds)
        print(table.to_markdown(), flush=True)
        if options.plot is not None:
            plot_time_against_mask(table, options.plot)
    if "early" in (options.table or tables):
        early = region_table(
            untrained("dit-digits"), digits, small, shares=(MASK,), steps=EARLY_STEPS, dense_steps=EARLY,
            rounds=options.rounds,
        )  # fmt: skip
        print(early.to_markdown(), flush=True)
    if "large" in (options.table or tables):
        print(step_table(dit_xl(), digits, large, MASK, rounds=options.rounds).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
