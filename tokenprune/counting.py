"""Counting: what a model costs under a patch, counted on its ghost, and what becomes of the patch by that."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from tokenprune.costs import CostModel, Curve, Probe, cost_model, count_flops, probe_sizes
from tokenprune.ghost import ghost
from tokenprune.host import Adapter, Host
from tokenprune.method import Method
from tokenprune.patch import Patch, attach
from tokenprune.restore import restoration_cost
from tokenprune.self_check import check_front, follow, verdicts
from tokenprune.solver import Counts, check_met


def ghosted(host: Host, adapter: Adapter, patch: Patch, probe: Probe | None, *, last_alone: bool = False) -> Host:
    """The host's ghost with a patch of its own attached, that counts or really reduces. last_alone: the blocks before
    the last one only hand on their input."""
    copy = follow(adapter.host(ghost(host.model, on_meta=True)), verdicts(host))
    shadow = Patch(copy, patch.adapter, replace(patch.method, training_only=False), patch.budget)  # it is in eval mode
    shadow.costs, shadow.solved, shadow.probe = patch.costs, dict(patch.solved), probe
    shadow.learned = None if patch.learned is None else deepcopy(patch.learned).to("meta")
    shadow.active, shadow.prefix_only_last = patch.active, patch.prefix_only_last
    sites = attach(copy, shadow)
    if last_alone:
        for block, site in zip(copy.blocks[:-1], sites, strict=False):
            block.module.forward = _hand_on
            site.reduces = False
    return copy


def count_patched(host: Host, adapter: Adapter, patch: Patch) -> int:
    """Multiply-adds of the patched forward at the model's usual input."""
    copy = ghosted(host, adapter, patch, None)
    return count_flops(copy.model, copy.example)


def count_costs(host: Host, adapter: Adapter, patch: Patch) -> CostModel:
    """The costs of the patched forward as a function of the token counts."""
    if not patch.active:  # nothing to solve, one count serves the report
        bare = adapter.host(ghost(host.model, on_meta=True))
        total = count_flops(bare.model, bare.example)
        return CostModel(host.tokens, total, (), Curve(((host.tokens, 0),)), head_sees_all=True)
    restored = patch.restored_blocks(host.model, {})
    restoring = partial(_restoring, patch.method, patch.depth, host.blocks[-1].width, restored)
    return cost_model(
        host.tokens,
        len(host.blocks),
        _probed(host, adapter, patch),
        head_sees_all=bool(restored),
        restoring=restoring if restored else None,
        last_whole=patch.method.restoration == "fusion",
    )


def _restoring(
    method: Method, depth: int, width: int, restored: Sequence[int], block: int, entering: int, leaving: int
) -> float:
    """Multiply-adds of bringing an image's tokens of `width` channels back to the `entering` ones of a block, behind
    those of the blocks `restored` that follow it."""
    lost, choice = entering - leaving, method.restoration
    if choice == "unmerge":  # what is merged is only copied
        lost = method.drops(block, depth, lost) if method.drops is not None else 0
    times = max(sum(behind >= block for behind in restored), 1)
    return restoration_cost(choice, lost, leaving, width, times) if lost else 0.0


def _probed(host: Host, adapter: Adapter, patch: Patch, *, last_alone: bool = False) -> list[tuple[Probe, int]]:
    """Counted runs at different token counts."""
    runs = []
    schedule = patch.method.schedule
    masked = patch.method.adaptive and patch.method.mask is not None
    unbounded = masked and patch.budget.kind in ("default", "flops")
    for tokens in probe_sizes(host.tokens):
        probe = Probe(tokens, lambda n: n if unbounded else max(schedule.fewest(n, patch.layout), n - n // 8))
        copy = ghosted(host, adapter, patch, probe, last_alone=last_alone)
        runs.append((probe, count_flops(copy.model, copy.example, probe)))
    return runs


def _hand_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def corrected(host: Host, adapter: Adapter, patch: Patch, counts: Counts) -> tuple[Counts, int]:
    """Counts whose really counted cost is nearest to the budget, and that: the aim is moved by the error that was
    counted.

    Raises:
        BudgetError: that is not within 1% of the unpatched model's.
    """
    assert patch.costs is not None
    base = patch.costs.total(host.tokens)
    aim = target = patch.budget.value * base
    tried = []
    for _ in range(3):
        patch.solved[host.tokens] = counts
        counted = count_patched(host, adapter, patch)
        error = counted - target
        tried.append((abs(error), counts, counted))
        if abs(error) <= abs(patch.costs.total(host.tokens, counts) - target) + 1e-4 * base:
            break
        aim -= error
        counts = patch._solve(host.tokens, aim)
    _, counts, counted = min(tried, key=operator.itemgetter(0))
    check_met(patch.budget, counts, counted / base)
    return counts, counted


def reads_prefix_only(host: Host, patch: Patch) -> bool:
    keeps_all = not patch.active or (patch.shares is not None and min(patch.shares.values()) == 1.0)
    if keeps_all or not host.num_prefix_tokens or host.prefix_tail is None:
        return False
    return host.prefix_tail(host.model) is not None


def compute_prefix_only(host: Host, adapter: Adapter, patch: Patch) -> None:
    """Switch `prefix_only_last` on where it can be, and say in the notes what becomes of it."""
    last = host.blocks[-1]
    if patch.method.adaptive or last.mid is None:
        why = "its packed images stay whole" if patch.method.adaptive else last.mid_refused
        patch.notes.append(f"{last.name}: runs on all its tokens, though only prefix tokens are read behind it: {why}")
        return
    if not check_front(host):
        patch.notes.append(f"{last.name}: runs on all its tokens: on prefix tokens alone it gives another output")
        return
    whole, budget = patch.costs, patch.budget
    assert whole is not None
    patch.prefix_only_last = True
    runs = _probed(host, adapter, patch, last_alone=True)
    alone = cost_model(host.tokens, len(host.blocks), runs, head_sees_all=False)
    costs = replace(whole, blocks=(*whole.blocks[:-1], alone.blocks[-1]), head=alone.head, unpatched=whole)
    # A budget so near to 1 that this alone would undercut it is met by tokens, as the method means it.
    if budget.kind == "flops" and costs.total(host.tokens, {}) < (budget.value + 0.02) * whole.total(host.tokens):
        patch.prefix_only_last = False
        patch.notes.append(f"{last.name}: runs on all its tokens: on prefix tokens alone it would undercut {budget}")
        return
    patch.costs = costs
    parts = "queries and MLP" if last.front_swaps else "MLP"
    patch.notes.append(
        f"{last.name}: {parts} run on the {host.num_prefix_tokens} prefix tokens alone where no others are read behind"
        " it (prefix_only_last=False switches that off)"
    )
