"""What an adaptive method costs in a batch: packed, against a fixed number of tokens and against padding with a mask.

    python -m tokenprune.evals.ragged

All arms drop by the same score in the same blocks, and as many tokens in the mean; only how they are spread over the
images, and how that is run, differs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.attention_record import AttentionRecord
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.throughput import measure
from tokenprune.method import Method
from tokenprune.ragged import RaggedReduction, keep_where
from tokenprune.reduction import Reduction
from tokenprune.registry import register_method
from tokenprune.schedule import Stages
from tokenprune.scores.attention import attention_to_class
from tokenprune.selection.top_k import ranked

PLACES = (3, 6, 9)
SHARES = (0.3, 0.7)


def spread_counts(batch: int, tokens: int, place: int) -> list[int]:
    """Tokens that each image has behind the `place`-th of PLACES: in the end from 0.3 to 0.7 of them, evenly spread,
    and at every place half-way ones in proportion."""
    shares = torch.linspace(*SHARES, batch, dtype=torch.float64)
    return [round(tokens * (1 - (1 - share) * (place + 1) / len(PLACES))) for share in shares.tolist()]


def keep_spread(scores: Tensor | None, record: AttentionRecord, keep: int, *, batch: int) -> RaggedReduction:
    """Keep the highest scores, as many as the image's turn in a batch of `batch` says."""
    assert scores is not None
    tokens, place, device = math.prod(record.grid or ()), PLACES.index(record.place), scores.device
    counts = spread_counts(batch, tokens, place)
    if place > 0:  # the number of tokens says whose turn it is
        before = spread_counts(batch, tokens, place - 1)
        counts = [counts[min(range(batch), key=lambda turn: abs(before[turn] - record.tokens))]]
    order = ranked(scores)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=device).expand_as(order))
    return keep_where(rank < torch.tensor(counts[: len(scores)], device=device)[:, None])


@dataclass(frozen=True)
class Padded(Reduction):
    """A reduction to the most tokens of any image; `real` [B, K] is one for the image's own and zero for padding."""

    real: Tensor | None = None

    def merged_sizes(self, sizes: Tensor) -> Tensor:
        """Sizes of zero, so that the keys' bias log(size) is the mask."""
        assert self.real is not None
        return self.real


def keep_padded(scores: Tensor | None, record: AttentionRecord, keep: int, *, batch: int) -> Reduction:
    """Keep as many of every image as of the one that keeps most, and mask what is too many."""
    assert scores is not None
    tokens, place = math.prod(record.grid or ()), PLACES.index(record.place)
    counts = torch.tensor(spread_counts(batch, tokens, place)[: len(scores)], device=scores.device)
    real = (torch.arange(keep, device=scores.device) < counts[:, None]).float()
    return Padded(ranked(scores)[:, :keep], real=real)


@tokenprune.register_method("spread")
def spread(*, batch: int = 16) -> Method:
    """A made-up adaptive method for measurements."""
    return Method(
        name="spread",
        paper="a measurement of tokenprune",
        schedule=Stages(1.0, PLACES),
        score=attention_to_class,
        select=partial(keep_spread, batch=batch),
        adaptive=True,
        needs=frozenset({"queries", "keys"}),
    )


@register_method("spread_padded")
def spread_padded(*, batch: int = 16) -> Method:
    """The same by padding and masking."""
    return Method(
        name="spread_padded",
        paper="a measurement of tokenprune",
        schedule=Stages(1.0, PLACES),
        score=attention_to_class,
        select=partial(keep_padded, batch=batch),
        merges=True,
        proportional=True,
        needs=frozenset({"queries", "keys"}),
    )


def schedule(share: float) -> dict[int | str, float]:
    """The explicit schedule that leaves the `share` in the end, in equal steps."""
    left = [1 - (1 - share) * (place + 1) / len(PLACES) for place in range(-1, len(PLACES))]
    return {block: after / before for block, before, after in zip(PLACES, left, left[1:], strict=False)}


def arms(model: nn.Module, batch: int) -> dict[str, nn.Module]:
    """The patched copies of `model`, on its own weights; the first is what the others are compared with."""
    fixed = tokenprune.patch(shared_copy(model), "top_k", schedule=schedule(0.5))
    packed = tokenprune.patch(shared_copy(model), "spread", schedule=schedule(SHARES[1]), batch=batch)
    padded = tokenprune.patch(shared_copy(model), "spread_padded", schedule=schedule(SHARES[1]), batch=batch)
    return {"0.5 of every image": fixed, "packed": packed, "padded and masked": padded, "unpatched": model}


def compare(model: nn.Module, images: Tensor, *, rounds: int = 20) -> Table:
    """Time of a forward of each arm on images [B, C, H, W], as a ratio to that of a fixed number of tokens.

    Columns: `ms` of a forward (median), `relative` (median of per-round ratios, with a 95% bootstrap interval; 1 is the
    fixed method, more is slower), `control` (the fixed method against itself).
    """
    built = arms(model, len(images))
    fixed, control = next(iter(built.values())), None
    rows: list[Row] = []
    for name, arm in built.items():
        control = shared_copy(fixed)
        with torch.inference_mode():
            timing = measure(
                partial(fixed, images), partial(arm, images), partial(control, images), rounds=rounds, attempts=1
            )
        ratio = timing.speedup
        rows.append(
            {
                "way": name,
                "ms": 1000 * timing.seconds_patched,
                "relative": 1 / ratio.estimate,
                "relative_low": 1 / ratio.high,
                "relative_high": 1 / ratio.low,
                "control": timing.control,
            }
        )
    return Table(rows, environment(images.device, images.dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a DINOv2 ViT-S/14 at 224 pixels with random weights."""
    parser = argparse.ArgumentParser(prog="python -m tokenprune.evals.ragged", description=main.__doc__)
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="at least 20 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    images = torch.randn(options.batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    print(compare(vit, images, rounds=options.rounds).to_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
