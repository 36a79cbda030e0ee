"""What a report says of an image tower."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenprune.patch import Patch
    from tokenprune.solver import Counts


def summarise(patch: Patch) -> dict[str, Any]:
    """The data of `Report.to_dict`; multiply-adds are those of one image at the size of the last forward, of an
    adaptive method the mean over its images."""
    tokens = patch.entered
    images = _images(patch)
    assert patch.costs is not None
    before = patch.costs.total(tokens)
    adaptive = patch.method.adaptive
    after = fmean(patch.costs.total(tokens, counts, adaptive=adaptive) for counts in images)
    if patch.counted is not None and tokens == patch.tokens:
        after = patch.counted  # of the very forward, not of the model of its cost
    notes = list(patch.notes)
    if adaptive and patch.active and not patch.seen:
        notes.append("adaptive: these are the most tokens; what is kept is known after a forward")
    return {
        "method": patch.method.name,
        "paper": patch.method.paper,
        "family": patch.adapter,
        "budget": str(patch.budget),
        "restore": patch.method.restoration,
        "tokens": tokens,
        "num_prefix_tokens": patch.num_prefix_tokens,
        "flops_before": round(before),
        "flops_after": round(after),
        "flops_ratio": after / before,
        "places": _places(patch, images),
        "skipped": dict(patch.skipped),
        "notes": notes,
    }


def _images(patch: Patch) -> list[Counts]:
    """Tokens leaving each place: of each image of the last forward, or of any where all keep the same number."""
    if not patch.active:
        return [{}]
    if not patch.seen:
        return [patch.counts(patch.entered)]
    return [{index: left[image] for index, left in patch.seen} for image in range(len(patch.seen[0][1]))]


def _places(patch: Patch, images: list[Counts]) -> list[dict[str, Any]]:
    """(name, tokens in, tokens out) of each place at the size of the last forward."""
    places: list[dict[str, Any]] = []
    entered: float = patch.entered
    for index in sorted(images[0]):
        left = [counts[index] for counts in images]
        mean = left[0] if len(images) == 1 else round(fmean(left), 1)
        places.append({"name": patch.names[index], "tokens_in": entered, "tokens_out": mean})
        if patch.method.adaptive:
            places[-1].update(fewest=min(left), most=max(left))
        entered = mean
    return places
