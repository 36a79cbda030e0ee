"""Patch: one method on one model, from the facts of the host to the hooks on its blocks."""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from tokenprune.budget import Budget
from tokenprune.costs import CostModel, Curve, Probe, cost_model, count_flops, probe_sizes
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.ghost import ghost
from tokenprune.host import Adapter, BlockHost, Host
from tokenprune.method import Method
from tokenprune.recording import Forward, Recording
from tokenprune.schedule import Layout
from tokenprune.self_check import check_blocks, check_front, check_packing
from tokenprune.site import Site
from tokenprune.solver import Counts, follow_shares, solve
from tokenprune.state import Entry, TokenState, constant_in_graphs, flow
from tokenprune.tower_report import summarise


class Patch:
    """What a patch knows for as long as it is on: plain data and the sites, no module.

    active: whether anything is reduced (not at a budget of 1.0). prefix_only_last: whether the last block's output is
    computed for the prefix tokens alone in forwards where no other is read. seen: of an adaptive method, (block, tokens
    that left it of each image) of the last forward.
    """

    def __init__(self, host: Host, adapter: str, method: Method, budget: Budget) -> None:
        self.key = uuid4().hex
        self.adapter = adapter
        self.method = method
        self.budget = budget
        self.num_prefix_tokens = host.num_prefix_tokens
        self.has_class_token = host.has_class_token
        self.grid = host.grid
        self.tokens = host.tokens
        self.depth = len(host.blocks)
        self.layout = Layout(self.depth, host.num_prefix_tokens)
        self.active = not budget.is_full
        self.shares = _shares(budget, host)
        self.restored = host.restored
        self.refused = host.refused
        self.grid_of = host.grid_of
        self.prefix_tail = host.prefix_tail
        self.prefix_only_last = False
        self.names = tuple(block.name for block in host.blocks)
        self.skipped: dict[str, str] = {}
        self.notes = list(host.notes)
        self.costs: CostModel | None = None
        self.solved: dict[int, Counts] = {}
        self.counted: int | None = None
        self.seen: tuple[tuple[int, tuple[int, ...]], ...] = ()
        self.entered = host.tokens
        self.probe: Probe | None = None
        self.recordings: list[Recording] = []

    @property
    def places(self) -> tuple[int, ...]:
        """Indices of the blocks at which tokens are reduced."""
        if self.shares is not None:
            return tuple(sorted(self.shares))
        return self.method.schedule.places(self.layout)

    def counts(self, entering: int) -> Counts:
        """Tokens leaving each place for `entering` tokens, solved once for each number.

        Raises:
            BudgetError: the budget cannot be met at this size.
        """
        return self._counts(self.key, operator.index(entering))

    @constant_in_graphs
    def _counts(self, key: str, entering: int) -> Counts:
        if entering not in self.solved:
            self.solved[entering] = self._solve(entering)
        return self.solved[entering]

    def _solve(self, entering: int, target: float | None = None) -> Counts:
        if self.shares is not None:
            return follow_shares(self.shares, self.method.schedule, entering, self.layout)
        return solve(self.budget, self.method.schedule, entering, self.layout, self.costs, target)

    def leaving(self, index: int, state: TokenState) -> int | None:
        """How many tokens leave place `index`, None where it is to be passed over.

        An explicit schedule runs its places even where it keeps every token. Of an adaptive method it is the most.
        """
        if self.probe is not None:
            return self.probe.leaving(state)
        keep = self.counts(state.entering)[index]
        if self.method.adaptive:
            return keep
        if keep > state.tokens or (keep == state.tokens and self.shares is None):
            return None
        return keep

    def restored_blocks(self, model: nn.Module, kwargs: dict[str, Any]) -> frozenset[int]:
        """Blocks behind which the full grid is restored in a forward, because what follows them reads it."""
        if not self.active or self.restored is None:
            return frozenset()
        return self.restored(model, self.method.merges, kwargs)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: a forward of the whole model starts."""
        if self.active and self.refused is not None:
            reason = self.refused(model, self.method.proportional, *args, **kwargs)
            if reason:
                raise UnsupportedModel(reason)
        grid: tuple[int, int] | None = self.grid
        if self.grid_of is not None and not torch.compiler.is_compiling():  # there it would be a graph for each size
            grid = self.grid_of(model, *args, **kwargs)
        flow().entry = entry = Entry(self.restored_blocks(model, kwargs), whole=True, grid=grid)
        entry.front = self._front(model)
        if self.method.adaptive:
            entry.last = max(index for index, name in enumerate(self.names) if _has(model, name))

    def _front(self, model: nn.Module) -> int | None:
        """The number of prefix tokens, where the last block may put out them alone: nothing else is read behind it, no
        recording asks where the others went, and nobody's hook would see them missing."""
        if not self.prefix_only_last or self.prefix_tail is None or self.recordings:
            return None
        tail = self.prefix_tail(model)
        if tail is None or any(_watched(module) for module in tail):
            return None
        return self.num_prefix_tokens

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: it has ended, by a result or an exception."""
        flow().end()

    def new_forward(self, grid: tuple[int, int] | None) -> Forward | None:
        """The recording of a forward that starts now, where one is wanted."""
        if not self.recordings:
            return None
        forward = Forward(grid)
        for recording in self.recordings:
            recording.forwards.append(forward)
        return forward

    def mark(self, site: Site, point: str) -> None:
        """A point of a counted forward."""
        if self.probe is not None:
            self.probe.mark(site, point)

    def summary(self) -> dict[str, Any]:
        """The data of the report."""
        return summarise(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recordings": []}


class Towers:
    """The family (`tokenprune.family.Family`) of the models of one adapter: image towers, from facts about a Host."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.name = adapter.name

    def find(self, target: object) -> nn.Module | None:
        """The adapter's model in `target`, or None."""
        return self.adapter.find(target)

    def prepare(self, model: nn.Module, method: Method, request: Request) -> Patch:
        """The patch of an image tower."""
        if request.steps is not None:
            raise UnsupportedMethod(
                f"steps= is for denoising runs, and {type(model).__name__} has none; use schedule={{block: share}}"
            )
        if request.positions is not None:
            raise UnsupportedMethod(
                f"positions= is of the tokens of a prompt, and {type(model).__name__} has none; leave it out"
            )
        return prepare(
            self.adapter.host(model), self.adapter, method, request.budget, prefix_only_last=request.prefix_only_last
        )

    def attach(self, model: nn.Module, patch: Patch) -> None:
        """Put a patch on the tower."""
        attach(self.adapter.host(model), patch)


def prepare(host: Host, adapter: Adapter, method: Method, budget: Budget, *, prefix_only_last: bool) -> Patch:
    """The patch of `host`, its budget solved at the model's usual input; nothing is attached yet.

    prefix_only_last: see `tokenprune.patch`.

    Raises:
        UnsupportedModel: a block stands at several places.
        UnsupportedMethod: the method needs what the model does not have.
        BudgetError: the budget cannot be met.
    """
    if len({id(block.module) for block in host.blocks}) < len(host.blocks):
        raise UnsupportedModel(
            f"blocks of {type(host.model).__name__} are one and the same module, run several times in a forward; give"
            " each place a module of its own (copy.deepcopy)"
        )
    patch = Patch(host, adapter.name, method, budget)
    if method.proportional and not all(block.takes_bias for block in host.blocks):
        raise UnsupportedMethod(
            f"{method.name} adds log(size) to the attention logits, and {type(host.blocks[0].module).__name__} takes no"
            f" bias; patch(model, {method.name!r}, proportional=False, ...) works"
        )
    if patch.active and method.adaptive:
        _check_adaptive(host, method, budget)
    if patch.active:
        missing = method.needs - {kind for block in host.blocks for kind in _caught(block)}
        if missing:
            raise UnsupportedMethod(
                f"{method.name} needs {', '.join(sorted(missing))}, which this model does not expose"
            )
    check_blocks(host)
    patch.costs = _count_costs(host, adapter, patch)
    if prefix_only_last and _reads_prefix_only(host, patch):
        _compute_prefix_only(host, adapter, patch)
    if patch.active:
        counts = patch.counts(host.tokens)
        if budget.kind == "flops":
            patch.solved[host.tokens] = _corrected(host, adapter, patch, counts)
        if not method.adaptive:  # what an image costs is known when it is there
            copy, _ = _ghosted(host, adapter, patch, None)
            patch.counted = count_flops(copy.model, copy.example)
    return patch


def _check_adaptive(host: Host, method: Method, budget: Budget) -> None:
    if budget.kind == "flops":
        raise BudgetError(
            f"{method.name} keeps a different number of tokens in each image, and what that costs on average is not"
            f" known without calibration, which is not there yet: {budget} cannot be met. keep=, tokens= and schedule="
            f" work, as the most that is kept of an image, and so do the method's own options"
        )
    if not host.ragged_head or not all(block.ragged_swaps for block in host.blocks):
        raise UnsupportedMethod(
            f"{method.name} keeps a different number of tokens in each image, which {type(host.model).__name__} cannot"
            " run; a method with a fixed number works, such as 'top_k'"
        )
    check_packing(host)


def _reads_prefix_only(host: Host, patch: Patch) -> bool:
    keeps_all = not patch.active or (patch.shares is not None and min(patch.shares.values()) == 1.0)
    if keeps_all or not host.num_prefix_tokens or host.prefix_tail is None:
        return False
    return host.prefix_tail(host.model) is not None


def _compute_prefix_only(host: Host, adapter: Adapter, patch: Patch) -> None:
    """Switch `prefix_only_last` on where it can be, and say in the notes what becomes of it."""
    last = host.blocks[-1]
    if patch.method.adaptive or last.mid is None:
        why = "its packed images stay whole" if patch.method.adaptive else last.mid_refused
        patch.notes.append(f"{last.name}: runs on all its tokens, though only prefix tokens are read behind it: {why}")
        return
    check_front(host)
    whole, budget = patch.costs, patch.budget
    assert whole is not None
    patch.prefix_only_last = True
    costs = replace(_count_costs(host, adapter, patch), unpatched=whole)
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


def attach(host: Host, patch: Patch) -> list[Site]:
    """Put the patch on the host's model."""
    reducing = set(patch.places) if patch.active else set()
    sites = []
    for index, block in enumerate(host.blocks):
        mid = block.mid is not None and (patch.method.position == "mid" or not patch.active)
        site = Site(patch, index, block, reduces=index in reducing, mid=mid)
        if block.mid_refused and patch.method.position == "mid" and index in reducing:
            patch.skipped[block.name] = f"reduced behind the block: {block.mid_refused}"
        site.attach(block)
        front = patch.prefix_only_last and block is host.blocks[-1]
        ragged = patch.active and patch.method.adaptive
        swaps = (*block.swaps, *block.front_swaps) if front else block.swaps
        for module, swapped in block.ragged_swaps if ragged else swaps:
            module.__class__ = swapped
        if (mid or front) and block.mid is not None:
            block.module.__class__ = block.mid
        sites.append(site)
    for module, swapped in host.swaps:
        module.__class__ = swapped
    host.model.register_forward_pre_hook(patch.begin, with_kwargs=True, prepend=True)
    host.model.register_forward_hook(patch.end, always_call=True)
    return sites


def _watched(module: nn.Module) -> bool:
    """Whether a hook on `module` is not a patch's."""
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not isinstance(getattr(hook, "__self__", None), Site) for hooks in tables for hook in hooks.values())


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _caught(block: BlockHost) -> set[str]:
    kinds = {kind for kind, _ in block.taps}
    return kinds | ({"queries", "keys"} if "inputs" in kinds else set()) | ({"values"} if block.values else set())


def _shares(budget: Budget, host: Host) -> dict[int, float] | None:
    if budget.kind != "schedule":
        return None
    names = {block.name: index for index, block in enumerate(host.blocks)}
    shares: dict[int, float] = {}
    for place, share in budget.shares:
        index = names.get(place, int(place) if re.fullmatch(r"-?[0-9]+", place) else None)
        if index is None or not -len(names) <= index < len(names):
            raise BudgetError(
                f"schedule names the place {place!r}; the model has blocks 0 to {len(names) - 1}"
                f" ({host.blocks[0].name} ...)"
            )
        if index % len(names) in shares:
            raise BudgetError(f"schedule names block {index % len(names)} twice; give each block one share")
        shares[index % len(names)] = share
    return shares


def _ghosted(host: Host, adapter: Adapter, patch: Patch, probe: Probe | None) -> tuple[Host, Patch]:
    """The host's ghost with a patch of its own attached, that counts or really reduces."""
    copy = adapter.host(ghost(host.model, on_meta=True))
    for block, checked in zip(copy.blocks, host.blocks, strict=True):
        if checked.mid is None:
            block.mid = None
        if not checked.front_swaps:
            block.front_swaps = ()
    shadow = Patch(copy, patch.adapter, patch.method, patch.budget)
    shadow.costs, shadow.solved, shadow.probe = patch.costs, dict(patch.solved), probe
    shadow.active, shadow.prefix_only_last = patch.active, patch.prefix_only_last
    attach(copy, shadow)
    return copy, shadow


def _count_costs(host: Host, adapter: Adapter, patch: Patch) -> CostModel:
    if not patch.active:  # nothing to solve, one count serves the report
        bare = adapter.host(ghost(host.model, on_meta=True))
        total = count_flops(bare.model, bare.example)
        return CostModel(host.tokens, total, (), Curve(((host.tokens, 0),)), head_sees_all=True)
    runs = []
    schedule = patch.method.schedule
    for tokens in probe_sizes(host.tokens):
        probe = Probe(tokens, lambda n: max(schedule.fewest(n, patch.layout), n - n // 8))
        copy, _ = _ghosted(host, adapter, patch, probe)
        runs.append((probe, count_flops(copy.model, copy.example, probe)))
    restored = bool(patch.restored_blocks(host.model, {}))
    regressed = host.blocks[-1].width if restored and not patch.method.merges else 0
    return cost_model(host.tokens, len(host.blocks), runs, head_sees_all=restored, regressed=regressed)


def _corrected(host: Host, adapter: Adapter, patch: Patch, counts: Counts) -> Counts:
    """Counts whose really counted cost is nearest to the budget: the aim is moved by the error that was counted."""
    assert patch.costs is not None
    base = patch.costs.total(host.tokens)
    aim = target = patch.budget.value * base
    best, smallest = counts, float("inf")
    for _ in range(3):
        patch.solved[host.tokens] = counts
        copy, _ = _ghosted(host, adapter, patch, None)
        error = count_flops(copy.model, copy.example) - target
        if abs(error) < smallest:
            best, smallest = counts, abs(error)
        if abs(error) <= abs(patch.costs.total(host.tokens, counts) - target) + 1e-4 * base:
            break
        aim -= error
        counts = patch._solve(host.tokens, aim)
    return best
