"""Whether a method for tokens can be on a model of windows, and its patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from tokenprune.budget import Budget
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.ghost import ghost
from tokenprune.method import Method
from tokenprune.narrow.costs import Count, Counted, Probe
from tokenprune.narrow.host import NarrowHost
from tokenprune.narrow.patch import NarrowPatch, attach
from tokenprune.narrow.plan import Counts, by_cost, by_share, worthwhile
from tokenprune.schedule import kept_count
from tokenprune.windows.plan import shares_of
from tokenprune.windows.prepare import refuse_runs

Describe = Callable[[nn.Module], NarrowHost]
_ATTENTION = {"queries", "keys", "values"}


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> NarrowPatch:
    """The patch, its budget solved at the usual input; nothing is attached yet.

    Raises:
        UnsupportedModel: no block's windows hold tokens alone.
        UnsupportedMethod: the method needs what windows do not have.
        BudgetError: the budget cannot be met.
    """
    _check_request(method, request, type(model).__name__)
    host = describe(model)
    patch = NarrowPatch(host, adapter, method, request)
    tokens = {}
    for index, layout in enumerate(patch.layouts):
        if layout.tiling.padded(layout.grid(host.grid)):
            patch.skipped[layout.name] = "left alone: its windows hold padding"
        else:
            tokens[index] = layout.tiling.area
    if not tokens:
        why = "; ".join(f"{name} {reason}" for name, reason in list(patch.skipped.items())[:3])
        raise UnsupportedModel(f"no block of this {type(model).__name__} can run on fewer tokens: {why}")
    count = _counter(describe, patch, model)
    patch.whole = count({})
    if patch.active:
        patch.keep = _solved(patch, tokens, count)
        patch.counted = count(patch.keep)
    return patch


def _check_request(method: Method, request: Request, name: str) -> None:
    refuse_runs(method, request, name)
    if method.learned is not None:
        raise UnsupportedMethod(f"{method.name} learns for the blocks of an image tower, not within windows of {name}")
    missing = method.needs - _ATTENTION
    if missing:
        raise UnsupportedMethod(
            f"{method.name} needs {', '.join(sorted(missing))}, which blocks of windows do not expose; 'top_k' and"
            f" 'sparsevit' work on {name}"
        )
    budget = request.budget
    if budget.kind in ("tokens", "own"):
        raise BudgetError(
            f"{budget} counts tokens that leave a block, and behind each block of {name} all are there again;"
            f" patch(model, {method.name!r}, keep={method.stack_share:g}) works"
        )
    if getattr(method.schedule, "at", None) is not None:
        raise BudgetError(f"places= names blocks behind which tokens are gone, and {name} has none; use schedule=")
    if method.adaptive and budget.kind == "flops" and not budget.is_full:
        raise BudgetError(
            f"{method.name} keeps a different number of tokens in each window, and what that costs is not known before:"
            f" {budget} cannot be met. keep= and schedule= work, as the most that is kept of a window"
        )


def _solved(patch: NarrowPatch, tokens: Mapping[int, int], count: Count) -> Counts:
    """Tokens of each window in each block that is reduced."""
    method, budget, whole = patch.method, patch.budget, patch.whole
    assert whole is not None
    if budget.kind == "schedule":
        return _scheduled(patch, tokens, budget)
    if budget.kind == "flops":
        counts = by_cost(budget, method, tokens, whole, count)
    else:
        share = budget.value if budget.kind == "keep" else 1.0 if method.adaptive else method.stack_share
        counts = by_share(share, method, tokens, budget)
        if not method.adaptive:  # whose tokens are known when they are there
            counts, _ = worthwhile(counts, count(counts), whole)
    if not counts:
        raise BudgetError(
            f"{budget}: choosing costs {method.name} as much as fewer tokens save in every MLP; use a smaller keep="
        )
    for index in tokens.keys() - counts.keys():
        patch.skipped[patch.layouts[index].name] = "left alone: choosing would cost what fewer tokens save"
    return counts


def _scheduled(patch: NarrowPatch, tokens: Mapping[int, int], budget: Budget) -> Counts:
    counts: Counts = {}
    for index, share in shares_of(budget, patch.layouts, patch.depth).items():
        name = patch.layouts[index].name
        if index not in tokens:
            raise BudgetError(f"schedule names {name}, which is {patch.skipped[name]}")
        if share < 1:
            counts |= by_share(share, patch.method, {index: tokens[index]}, budget)
        else:
            counts[index] = kept_count(share, tokens[index])
    for index in tokens.keys() - counts.keys():
        patch.skipped[patch.layouts[index].name] = "left alone: the schedule does not name it"
    return counts


def _counter(describe: Describe, patch: NarrowPatch, model: nn.Module) -> Count:
    """Counts a forward of one image at given numbers of tokens."""
    host = describe(ghost(model, on_meta=True))
    shadow = NarrowPatch(host, patch.adapter, patch.method, Request(patch.budget))
    attach(host, shadow)

    def count(keep: Mapping[int, int]) -> Counted:
        shadow.keep, shadow.probe = dict(keep), Probe()
        with torch.no_grad(), shadow.probe.count:
            host.model(host.example(1))
        return shadow.probe.counted(len(patch.layouts))

    return count
