"""Fixed counts: a learned method's own number of tokens for each image, as one number for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.api import patched, record, report
from tokenprune.bisection import nearest_to
from tokenprune.budget import checked_share
from tokenprune.errors import BudgetError
from tokenprune.recording import PlaceRecord
from tokenprune.registry import own_budget
from tokenprune.schedule import kept_count
from tokenprune.stored_schedule import StoredSchedule

ROUNDS = 12
NEAR, MET = 0.003, 0.01


def fixed_counts(
    model: nn.Module,
    images: Tensor,
    method: str,
    *,
    flops: float,
    batch_size: int,
    restore: str | None = None,
    **options: Any,
) -> StoredSchedule:
    """A schedule of the method's fixed form (`ltmp` -> `ltmp_fixed`): in each block the mean share of the tokens that
    leave it over the images, all of them raised to the power at which it costs a share `flops`, and what of the others
    is dropped.

    Raises:
        BudgetError: no power meets the budget within 1%.
    """
    aim = checked_share("flops", flops)
    own = options if "weights" in options else {**options, "flops": aim}
    left, dropped, names, tokens = _seen(model, images, method, batch_size, {**own, "restore": restore})
    fixed = {key: value for key, value in options.items() if key not in ("weights", "places", own_budget(method))}
    fixed["dropped"] = dropped

    def tried(power: float) -> tuple[float, dict[int | str, float]]:
        shares: dict[int | str, float] = {
            name: round(min(1.0, max(0.5, share**power)), 4) for name, share in zip(names, left, strict=True)
        }
        return _ratio(model, f"{method}_fixed", shares, {**fixed, "restore": restore}, tokens), shares

    ratio, shares = nearest_to(aim, tried, 0.0, 4.0, first=1.0, rising=False, near=NEAR, rounds=ROUNDS)
    if abs(ratio - aim) > MET:
        raise BudgetError(
            f"flops={flops:g} is met by no fixed numbers like those of {method}: the nearest cost {ratio:.2f}; use"
            f" flops={ratio:.2f}, or train {method} for that budget"
        )
    found = {"goal": {"flops": flops}, "flops_ratio": ratio, "images": len(images), "of": method}
    return StoredSchedule(f"{method}_fixed", shares, fixed, found, restore)


def _ratio(
    model: nn.Module, method: str, shares: dict[int | str, float], options: dict[str, Any], tokens: int
) -> float:
    if all(kept_count(share, tokens) == tokens for share in shares.values()):
        return 1.0
    with patched(model, method, schedule=shares, **options):
        ratio: float = report(model).to_dict()["flops_ratio"]
        return ratio


def _seen(
    model: nn.Module, images: Tensor, method: str, batch_size: int, options: dict[str, Any]
) -> tuple[list[float], list[float], list[int], int]:
    """Of each place the mean share that leaves, the share of the removed that is dropped, and its block; and the tokens
    that enter the first."""
    with patched(model, method, **options), torch.no_grad():
        entered = 0.0
        leaving: list[float] = []
        gone: list[float] = []
        for batch in torch.split(images, batch_size):
            with record(model) as recording:
                model(batch)
            places = recording.forwards[0].places
            if not leaving:
                leaving, gone = [0.0] * len(places), [0.0] * len(places)
            entered += batch.shape[0] * places[0].source.shape[1]
            for index, place in enumerate(places):
                leaving[index] += float((place.kept >= 0).sum())
                gone[index] += _dropped(place, places[index - 1] if index else None)
        blocks = [int(name.rsplit(".", 1)[1]) for name in (place.name for place in places)]
    shares, dropped = [], []
    before = entered
    for left, lost in zip(leaving, gone, strict=True):
        shares.append(left / before)
        dropped.append(round(lost / (before - left), 4) if before > left else 0.0)
        before = left
    whole = [0.0] * (max(blocks) + 1)
    for block, share in zip(blocks, dropped, strict=True):
        whole[block] = share
    return shares, whole, blocks, places[0].source.shape[1]


def _dropped(place: PlaceRecord, before: PlaceRecord | None) -> float:
    """How many of the tokens that entered a place nothing stands for behind it: those whose own patch has no source."""
    if before is None:
        return float((place.source < 0).sum())
    entered = before.kept
    return float(((place.source.gather(1, entered.clamp(min=0)) < 0) & (entered >= 0)).sum())
