"""Calibration: thresholds from unlabelled images: each image keeps what it needs, the average meets a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tokenprune.api import patched, report
from tokenprune.attention_record import AttentionRecord
from tokenprune.budget import checked_share
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import active_patches
from tokenprune.methods.adaptive_tome import MergeSimilarEnough
from tokenprune.patch import Patch
from tokenprune.ragged import RaggedReduction
from tokenprune.solver import Counts
from tokenprune.stored_schedule import StoredSchedule

NEVER = 2.0
NEAR = 0.003
ROUNDS = 5


@dataclass(frozen=True)
class Observed:
    """The selection, and the cosines of all pairs that it saw at block `place`."""

    select: MergeSimilarEnough
    place: int
    seen: list[Tensor]

    def __call__(self, scores: Tensor | None, record: AttentionRecord, keep: int) -> RaggedReduction:
        if record.place == self.place and record.tokens > 1:
            self.seen.append(self.select.matched(record)[0].flatten())
        return self.select(scores, record, keep)


def calibrate(
    model: nn.Module,
    images: Tensor,
    method: str = "tome",
    *,
    flops: float,
    batch_size: int = 64,
    proportional: bool = True,
) -> StoredSchedule:
    """Thresholds at which `model` merges similar tokens, as many in each image as are similar, so that the mean over
    `images` costs a share `flops` of the multiply-adds; `model` is left as it is.

    images: [N, C, H, W] on the model's device, without labels. method: "tome", whose r at each block, solved for the
    budget, becomes the cosine from which pairs are merged there. batch_size: of the forwards. `patch(model,
    schedule=...)` takes what is returned; the report's FLOPs are then the mean over the images of the last forward.

    Raises:
        UnsupportedMethod: another method. UnsupportedModel: no image tower.
        BudgetError: the budget is malformed or cannot be met.
    """
    if method != "tome":
        raise UnsupportedMethod(f"calibrate knows thresholds for 'tome', not for {method!r}; calibrate(model, images)")
    aim = checked_share("flops", flops)
    for _ in range(ROUNDS):
        counts, tokens = _fixed(model, aim, proportional)
        found = _calibrated(model, images, counts, tokens, batch_size, proportional)
        ratio = _mean_flops(model, images, found, batch_size)
        if abs(ratio - flops) <= NEAR:
            break
        aim = min(0.999, max(0.01, aim + flops - ratio))
    else:
        raise BudgetError(
            f"flops={flops:g} was not met in {ROUNDS} rounds: the images cost {ratio:.3f} in the mean; use more images"
        )
    return replace(found, found={"goal": {"flops": flops}, "flops_ratio": ratio, "images": len(images)})


def _fixed(model: nn.Module, flops: float, proportional: bool) -> tuple[Counts, int]:
    """What tome leaves behind each block at that budget, with the whole last block computed as in a packed batch."""
    with patched(model, "tome", flops=flops, proportional=proportional, prefix_only_last=False):
        found = _patch_of(model)
        return dict(found.counts(found.tokens)), found.tokens


def _calibrated(
    model: nn.Module, images: Tensor, counts: Counts, tokens: int, batch_size: int, proportional: bool
) -> StoredSchedule:
    """The thresholds from which, one block after another, as many pairs are merged in the mean as tome merges."""
    thresholds = dict.fromkeys(counts, NEVER)
    for block, count in sorted(counts.items()):
        with patched(model, schedule=_stored(thresholds, proportional)):
            found, seen = _patch_of(model), list[Tensor]()
            select = found.method.select
            assert isinstance(select, MergeSimilarEnough)
            found.method = replace(found.method, select=Observed(select, block, seen))
            left = _run(model, images, batch_size, partial(_left, model, block))
        cosines = torch.cat(seen).sort(descending=True).values
        merged = round(float(left.sum()) - count * len(images))
        thresholds[block] = float(cosines[min(merged, len(cosines)) - 1]) if merged > 0 else NEVER
    return _stored(thresholds, proportional)


def _stored(thresholds: dict[int, float], proportional: bool) -> StoredSchedule:
    options = {"thresholds": {str(block): cosine for block, cosine in thresholds.items()}, "proportional": proportional}
    return StoredSchedule("adaptive_tome", dict.fromkeys(thresholds, 1.0), options)


def _mean_flops(model: nn.Module, images: Tensor, found: StoredSchedule, batch_size: int) -> float:
    with patched(model, schedule=found):
        return float(_run(model, images, batch_size, lambda: [report(model).to_dict()["flops_ratio"]]).mean())


def _run(model: nn.Module, images: Tensor, batch_size: int, told: Callable[[], list[float]]) -> Tensor:
    """What `told` says of each image, or once of all images of a batch alike, behind each forward: [N]."""
    values: list[float] = []
    with torch.no_grad():
        for batch in torch.split(images, batch_size):
            model(batch)
            said = told()
            values += said if len(said) == len(batch) else said * len(batch)
    return torch.tensor(values, dtype=torch.float64)


def _left(model: nn.Module, block: int) -> list[float]:
    """Tokens that left `block` of each image of the last forward."""
    return [float(count) for count in dict(_patch_of(model).seen)[block]]


def _patch_of(model: nn.Module) -> Patch:
    found = [one for one in active_patches(model).values() if isinstance(one, Patch)]
    if len(found) != 1:
        raise UnsupportedModel(f"calibrate is of one image tower, and {type(model).__name__} is none")
    return found[0]
