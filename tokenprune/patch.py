"""Patch: what is known of a patched image tower while the patch is on, and how it is put on its blocks."""

from __future__ import annotations

import operator
import re
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from tokenprune.budget import Budget
from tokenprune.costs import CostModel, Probe
from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Portable
from tokenprune.host import Host
from tokenprune.latency import LatencyTable
from tokenprune.learning import Lesson
from tokenprune.method import Method
from tokenprune.recording import Forward, Recording
from tokenprune.rows import RowSite
from tokenprune.schedule import Layout
from tokenprune.self_check import Verdict
from tokenprune.site import Site
from tokenprune.solver import Counts, follow_shares, solve
from tokenprune.state import Entry, TokenState, constant_in_graphs, flow
from tokenprune.taps import Taps
from tokenprune.tower_report import summarise


class Patch(Portable):
    """What a patch knows for as long as it is on: plain data and the sites, no module.

    active: whether anything is reduced (not at a budget of 1.0). fuses: whether all tokens come back in front of the
    last block. prefix_only_last: whether the last block's output is computed for the prefix tokens alone in forwards
    where no other is read. first: index of the first place. seen: of an adaptive method, (block, tokens that left it of
    each image) of the last forward. learned: the learned parts by block, None for a method that learns nothing; they
    stay in their own precision. lesson: of a training forward. verdicts: of the blocks, see `tokenprune.self_check`.
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
        self.fuses = self.active and method.restoration == "fusion"
        self.shares = _shares(budget, host)
        self.restored = host.restored
        self.refused = host.refused
        self.grid_of = host.grid_of
        self.row = host.row
        self.prefix_tail = host.prefix_tail
        self.prefix_only_last = False
        self.verdicts: tuple[Verdict, ...] = ()
        self.names = tuple(block.name for block in host.blocks)
        self.skipped: dict[str, str] = {}
        self.notes = list(host.notes)
        if self.active and method.training_only:
            self.notes.append(
                "acts in training forwards alone, whose multiply-adds these are; in eval mode every token is there"
            )
        self.costs: CostModel | None = None
        self.solved: dict[int, Counts] = {}
        self.counted: int | None = None
        self.seen: tuple[tuple[int, tuple[int, ...]], ...] = ()
        self.entered = host.tokens
        self.first = 0
        self.probe: Probe | None = None
        self.learned: nn.ModuleDict | None = None
        self.lesson: Lesson | None = None
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
            counts = self._solve(entering)
            self._check_size(entering, counts)
            self.solved[entering] = counts
        return self.solved[entering]

    def _check_size(self, entering: int, counts: Counts) -> None:
        learned, known = self.method.learned, self.solved.get(self.tokens)
        if learned is not None and learned.sized and known is not None and counts != known:
            raise UnsupportedMethod(
                f"{self.method.name} has learned to leave {list(known.values())} of {self.tokens} tokens, and of an"
                f" image of {entering} the budget would leave {list(counts.values())}: use images of the model's usual"
                " size, or train it for this one"
            )

    def _solve(self, entering: int, target: float | None = None) -> Counts:
        if self.shares is not None:
            return follow_shares(self.shares, self.method.schedule, entering, self.layout)
        if self.method.adaptive and self.budget.kind == "flops":  # learned, and so no bound
            return dict(zip(self.places, self.method.schedule.default(entering, self.layout), strict=True))
        return solve(self.budget, self.method.schedule, entering, self.layout, self.costs, target)

    def leaving(self, index: int, state: TokenState) -> int | None:
        """How many tokens leave place `index`, None where it is to be passed over.

        An explicit schedule runs its places even where it keeps every token. Of an adaptive method it is the most.
        """
        if self.probe is not None:
            return self.probe.leaving(state)
        if self.lesson is not None and self.lesson.strength == 0.0:
            return None
        keep = self.counts(state.entering)[index]
        if self.method.adaptive:
            return keep
        if self.lesson is not None:
            keep = state.entering - round(self.lesson.strength * (state.entering - keep))
        if keep > state.tokens or (keep == state.tokens and self.shares is None):
            return None
        return keep

    def learned_part(self, index: int, device: torch.device) -> nn.Module | None:
        """What was learned for block `index`, on `device`, which the parts follow."""
        if self.learned is None:
            return None
        part = self.learned[str(index)]
        if any(parameter.device != device for parameter in part.parameters()):
            self.learned.to(device)
        return part

    def restored_blocks(self, model: nn.Module, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Blocks behind which the full grid is restored in a forward, because what follows them reads it."""
        if not self.active or self.restored is None:
            return ()
        return self.restored(model, self.method.merges, kwargs)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: a forward of the whole model starts."""
        entry = Entry(self.restored_blocks(model, kwargs), whole=True, grid=self.grid, owner=self)
        flow().start(entry)
        rests = self.method.training_only and not model.training
        if self.active and self.refused is not None and not rests:
            reason = self.refused(model, self.method.proportional, *args, **kwargs)
            if reason:
                raise UnsupportedModel(reason)
        if self.grid_of is not None and not torch.compiler.is_compiling():  # there it would be a graph for each size
            entry.grid = self.grid_of(model, *args, **kwargs)
        entry.front = self._front(model)
        if self.active and self.row is not None:
            entry.row = self.row(model, *args, **kwargs)
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

    def predicted(self, table: LatencyTable) -> dict[tuple[int, int], float]:
        """Time at each (batch, prunable tokens) of `table`, as a share of the unpatched one."""
        found: dict[tuple[int, int], float] = {}
        for tokens in () if self.unpredictable() else {row.tokens for row in table.rows}:
            assert self.costs is not None
            try:
                counts = self.counts(tokens)
            except BudgetError:  # at another resolution than the usual, to be raised by a forward of that size alone
                continue
            ratio = self.costs.total(tokens, counts) / self.costs.total(tokens)
            found |= table.predicted(self.method.name, tokens, ratio, len(counts))
        return found

    def mark(self, site: Site, point: str) -> None:
        """A point of a counted forward."""
        if self.probe is not None:
            self.probe.mark(site, point)

    def summary(self) -> dict[str, Any]:
        """The data of the report."""
        return summarise(self)


def attach(host: Host, patch: Patch) -> list[Site]:
    """Put the patch on the host's model."""
    reducing = set(patch.places) if patch.active else set()
    patch.first = min(reducing, default=0)
    sites = []
    for index, block in enumerate(host.blocks):
        mid = block.mid is not None and (patch.method.position == "mid" or not patch.active)
        kind = RowSite if block.in_row else Site
        site = kind(patch, index, block, reduces=index in reducing, mid=mid)
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
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:  # as of nearly all modules
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not isinstance(getattr(hook, "__self__", None), (Site, Taps)) for hook in hooks)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


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
