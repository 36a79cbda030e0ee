"""What `region` costs against the mask's share: whole denoising runs, the dense step that fills the caches included.

    python -m tokenprune.evals.region_speed

The weights are random; which tokens are computed is the mask's doing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.evals.digits_denoisers import untrained
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import measure

SHARES = (0.05, 0.1, 0.2, 0.4, 0.8)
STEPS = 20


def square(side: int, share: float) -> Tensor:
    """A mask [side, side] of zeros with a square of ones in the middle, `share` of it."""
    width = max(1, round(side * share**0.5))
    mask = torch.zeros(side, side)
    start = (side - width) // 2
    mask[start : start + width, start : start + width] = 1
    return mask


def region_table(
    model: nn.Module,
    draw: Callable[[nn.Module, Tensor, int], object],
    latents: Tensor,
    *,
    shares: Sequence[float] = SHARES,
    steps: int = STEPS,
    rounds: int = 20,
    attempts: int = 3,
) -> Table:
    """Runs of `steps` forwards on latents [B, C, H, W], with a mask and a ring of one token against none.

    draw: runs the model on the latents for one step of [steps - 1 .. 0]. Columns: `mask` (share of the area), `time`
    of the whole run over the unpatched one's with a 95% interval, `control`, `trusted`.
    """
    rows: list[Row] = []
    for share in shares:
        patched = tokenprune.patch(shared_copy(model), "region", mask=square(latents.shape[-1], share), ring=1)
        arms = [partial(_run, one, draw, latents, steps) for one in (model, patched, shared_copy(model))]
        with torch.inference_mode():
            timing = measure(*arms, rounds=rounds, warmup=1, attempts=attempts)
        ratio = timing.speedup
        row: Row = {"mask": share, **interval_cells("time", 1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low)}
        rows.append(row | {"control": timing.control, "trusted": timing.trusted})
    return Table(rows, {"batch": len(latents), "steps": steps, **environment()})


def _run(model: nn.Module, draw: Callable[[nn.Module, Tensor, int], object], latents: Tensor, steps: int) -> None:
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
    """Prints a table of the small DiT at batch 16 and one of two blocks of a DiT-XL/2."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.region_speed", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="of a quiet measurement (default: %(default)s)")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(16, 3, 36, 36, generator=generator), torch.randn(1, 4, 64, 64, generator=generator)
    timed = {"rounds": options.rounds, "attempts": options.attempts}
    print(region_table(untrained("dit-digits"), digits, small, **timed).to_markdown(), flush=True)
    print(region_table(dit_xl(), digits, large, shares=(0.1,), **timed).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
