"""What leaving tokens out saves in real-size stacks of U-Nets: fused attention on both sides, in one process.

    python -m tokenprune.evals.denoiser_speed

The weights are random; they decide which tokens go and not how long that takes. The comparison with the tomesd package
needs it installed (`pip install tomesd`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.evals.digits_checkpoints import trained
from tokenprune.evals.digits_denoisers import UNET, prompts
from tokenprune.evals.real_denoisers import later_steps
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stopwatch import Stopwatch
from tokenprune.evals.table import Row, Table, environment, interval_cells
from tokenprune.evals.throughput import Timing, measure
from tokenprune.methods.tomesd import tomesd


@dataclass(frozen=True)
class Level:
    """A stack of `depth` blocks of width `channels` on side x side tokens, as `model` has it."""

    model: str
    side: int
    channels: int
    depth: int
    heads: int
    text: int


LEVELS = (
    Level("SD 1.5 at 512", 64, 320, 1, 8, 768),
    Level("SD 1.5 at 512", 32, 640, 1, 8, 768),
    Level("SD 1.5 at 512", 16, 1280, 1, 8, 768),
    Level("SDXL at 1024", 64, 640, 2, 10, 2048),
    Level("SDXL at 1024", 32, 1280, 10, 20, 2048),
)
MIDDLE = (Level("SD 1.5 at 512", 64, 320, 3, 8, 768), Level("SDXL at 1024", 32, 1280, 3, 20, 2048))


class Through(nn.Module):
    """In place of a residual block: the first `channels` of what comes in. Only stacks are timed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x[:, : self.channels]


def unet(level: Level) -> nn.Module:
    """A U-Net of which the one stack on the way down is `level`, without its convolutions between the stacks."""
    from diffusers import UNet2DConditionModel

    model: Any = UNet2DConditionModel(
        sample_size=level.side,
        block_out_channels=(level.channels,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        transformer_layers_per_block=level.depth,
        attention_head_dim=level.heads,  # diffusers' name for their number
        cross_attention_dim=level.text,
    )
    for block in (*model.down_blocks, *model.up_blocks):
        block.resnets = nn.ModuleList(Through(level.channels) for _ in block.resnets)
    evaluated: nn.Module = model.eval()
    return evaluated


def compare(level: Level, patch: Callable[[nn.Module], object], part: str, *, rounds: int, attempts: int) -> Timing:
    """Times submodule `part` of the level's U-Net, patched by `patch`, against the same unpatched, batch 1, in steps of
    a run, of which each chooses its tokens."""
    base, clock = unet(level), Stopwatch()
    models = [base, shared_copy(base), shared_copy(base)]
    patch(models[1])
    for model in models:
        clock.watch(model.get_submodule(part))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, level.side, level.side, generator=generator)
    text = torch.randn(1, 77, level.text, generator=generator)
    arms = [later_steps(model, {"sample": latents, "encoder_hidden_states": text}) for model in models]
    with torch.inference_mode():
        return measure(*arms, rounds=rounds, warmup=1, attempts=attempts, clock=clock)


def stack_table(*, rounds: int = 20, attempts: int = 3) -> Table:
    """How much faster blocks and stacks of U-Nets are, a row for each level.

    First one block in the middle of a stack on every second token, the choice made before it; then whole stacks with
    the complete `at_edm`: a first block on all tokens that scores, or the score before a single block, and recovery.
    """
    rows: list[Row] = []
    stack = "down_blocks.0.attentions.0"
    for level in MIDDLE:
        half = partial(tokenprune.patch, method="uniform", keep=0.5, steps={})
        timing = compare(level, half, f"{stack}.transformer_blocks.1", rounds=rounds, attempts=attempts)
        rows.append(_row("a block, keep=0.5, given tokens", level, timing))
    for level in LEVELS:
        whole = partial(tokenprune.patch, method="at_edm", steps={})
        timing = compare(level, whole, stack, rounds=rounds, attempts=attempts)
        rows.append(_row("a stack, at_edm", level, timing))
    return Table(rows, environment())


def _row(what: str, level: Level, timing: Timing) -> Row:
    row: Row = {"what": what, "as in": level.model, "tokens": level.side**2, "channels": level.channels}
    row |= {"blocks": level.depth, **interval_cells("speedup", timing.speedup)}
    return row | {"control": timing.control, "trusted": timing.trusted}


def merge_table(*, rounds: int = 40, attempts: int = 3) -> Table:
    """Our match, merge and unmerge of half of 4,096 tokens of width 320, batch 2, against the tomesd package's.

    `speedup` is its time over ours.

    Raises ImportError without the package.
    """
    from tomesd.merge import bipartite_soft_matching_random2d

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 320, 64, 64, generator=generator)
    x = (nn.functional.avg_pool2d(x, 5, 1, 2) + 0.1 * x).flatten(2).transpose(1, 2).contiguous()  # smooth, as they are
    origin = torch.arange(4096).expand(2, -1)

    def theirs() -> Tensor:
        merge, unmerge, *_ = bipartite_soft_matching_random2d(x, 64, 64, 2, 2, 2048, generator=generator)
        given_back: Tensor = unmerge(merge(x))
        return given_back

    method = tomesd()

    def ours() -> Tensor:
        record = AttentionRecord(x, origin, 0, 0, 1, (64, 64), has_class_token=False, step=torch.tensor(5))
        reduction = method.reduce(record, 2048)
        return reduction.unmerge(reduction(x), 4096)

    with torch.inference_mode():
        timing = measure(theirs, ours, theirs, rounds=rounds, attempts=attempts)
    cells = interval_cells("speedup", timing.speedup)
    row: Row = {"what": "match, merge and unmerge", **cells, "share of its time": 1 / timing.speedup.estimate}
    return Table([row | {"control": timing.control, "trusted": timing.trusted}], environment())


def unet_table(*, rounds: int = 20, attempts: int = 1) -> Table:
    """Whole U-Nets with our `tomesd` against the same with the package's, which has to be there: SD 1.5 at 512 pixels,
    batch 1, and the shipped small one, two pictures with guidance."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    large = UNet2DConditionModel(cross_attention_dim=768).eval()
    small = trained(UNET)
    inputs = {"sample": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 77, 768)}
    rows = [against_package("SD 1.5 U-Net", large, inputs, 1, rounds, attempts)]
    inputs = {"sample": torch.randn(4, 3, 36, 36), "encoder_hidden_states": prompts(torch.arange(4))}
    rows.append(against_package(f"{UNET}, batch 4", small, inputs, 2, rounds, attempts))
    return Table(rows, environment())


def against_package(
    what: str, base: nn.Module, inputs: Mapping[str, Tensor], max_downsample: int, rounds: int, attempts: int
) -> Row:
    """Half of the tokens merged where the stacks are at most `max_downsample` times smaller than the latents."""
    from tomesd import apply_patch

    theirs = [apply_patch(shared_copy(base), ratio=0.5, max_downsample=max_downsample) for _ in range(2)]
    ours = tokenprune.patch(shared_copy(base), "tomesd", ratio=0.5, max_downsample=max_downsample)
    arms = [later_steps(model, inputs) for model in (theirs[0], ours, theirs[1])]
    with torch.inference_mode():
        timing = measure(*arms, rounds=rounds, warmup=1, attempts=attempts)
    row: Row = {"what": what, **interval_cells("speedup", timing.speedup)}
    return row | {"control": timing.control, "trusted": timing.trusted}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; those against the tomesd package where it is installed."""
    tables = {"stacks": stack_table, "merge": merge_table, "unet": unet_table}
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.denoiser_speed", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=3, help="of a quiet measurement (default: %(default)s)")
    parser.add_argument("--table", action="append", choices=list(tables), help="repeatable (default: all)")
    options = parser.parse_args(arguments)
    possible = list(tables) if importlib.util.find_spec("tomesd") is not None else ["stacks"]
    for name in options.table or possible:
        print(tables[name](rounds=options.rounds, attempts=options.attempts).to_markdown(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
