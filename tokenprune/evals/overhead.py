"""What share of the unpatched forward's time scoring, selecting and reducing take in a patched one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from tokenprune.errors import TokenPruneError
from tokenprune.evals.shared_copy import shared_copy
from tokenprune.evals.stats import Interval, bootstrap_median
from tokenprune.evals.table import Row, interval_cells
from tokenprune.family import active_patches
from tokenprune.patch import Patch
from tokenprune.site import Site

PARTS = ("score", "select", "reduce")
_OPERATORS = ("tokenprune::attention_mass", "tokenprune::few_logits", "tokenprune::cosine_match")
_REDUCTION, _UNPATCHED, _SCORE, _CHOOSE = (
    f"tokenprune.evals:{name}" for name in ("reduce", "plain", "score", "choose")
)


@dataclass(frozen=True)
class Overhead:
    """Shares of the unpatched forward's time: medians over rounds, of all (with a 95% bootstrap interval) and of each
    of PARTS. score: the method's score, attention mass and matching. select: the rest of the choice.
    reduce: re-indexing, dropping or merging, and everything else at a place."""

    total: Interval
    score: float
    select: float
    reduce: float


def profile_overhead(base: nn.Module, patched: nn.Module, images: Tensor, *, rounds: int = 20) -> Overhead:
    """Profiles forwards of `base` and `patched` in turn on images [B, C, H, W].

    `patched` is left instrumented: hand over a copy (`tokenprune.evals.shared_copy`) and drop it. On CUDA the parts are
    waited for one by one, which makes them dearer than they are.

    Raises TokenPruneError where `patched` carries no patch.
    """
    patches = [patch for patch in active_patches(patched).values() if isinstance(patch, Patch)]
    if not patches:
        raise TokenPruneError(
            "profile_overhead: this is not patched, as an image tower; tokenprune.patch(model, ...) first"
        )
    for patch in patches:
        method = patch.method
        score = None if method.score is None else partial(_ranged, _SCORE, method.score)
        patch.method = replace(method, score=score, select=partial(_ranged, _CHOOSE, method.select))
    for site in _sites(patched):
        site.reduce = partial(_ranged, _REDUCTION, site.reduce)  # type: ignore[method-assign]
    shares: dict[str, list[float]] = {part: [] for part in ("total", *PARTS)}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                order: list[Callable[[Tensor], Any]] = [partial(_ranged, _UNPATCHED, base), patched]
                for forward in order if turn % 2 else order[::-1]:
                    forward(images)
            if turn >= 2:  # the first ones warm up
                for part, share in _shares(profiler).items():
                    shares[part].append(share)
    medians = {part: bootstrap_median(shares[part]).estimate for part in PARTS}
    return Overhead(bootstrap_median(shares["total"]), **medians)


def overhead_cells(base: nn.Module, patched: nn.Module, images: Tensor, *, rounds: int = 20) -> Row:
    """`profile_overhead` on a copy of `patched`, as the cells of a table row: `overhead` and each of PARTS."""
    spent = profile_overhead(base, shared_copy(patched), images, rounds=rounds)
    total = interval_cells("overhead", spent.total)
    return {**total, **{part: getattr(spent, part) for part in PARTS}}


def _shares(profiler: profile) -> dict[str, float]:
    events = list(profiler.events())  # type: ignore[no-untyped-call]
    plain, total = _time(events, _UNPATCHED), _time(events, _REDUCTION)
    score, chosen = _time(events, _SCORE, *_OPERATORS), _time(events, _SCORE, _CHOOSE)
    parts = {"total": total, "score": score, "select": chosen - score, "reduce": total - chosen}
    return {part: time / plain for part, time in parts.items()}


def _time(events: Iterable[Any], *names: str) -> float:
    """Time within the events that a name starts, those inside others counted once."""
    spans = [event.time_range for event in events if event.name.startswith(names)]
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if span.end > end:
            total += span.end - max(span.start, end)
            end = span.end
    return total


def _ranged(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with record_function(name):
        result = function(*args, **kwargs)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return result


def _sites(model: nn.Module) -> list[Site]:
    found = [getattr(hook, "__self__", None) for block in model.modules() for hook in block._forward_pre_hooks.values()]
    return list(dict.fromkeys(site for site in found if isinstance(site, Site)))
