"""WindowsPatch: one method on one model of windows."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from statistics import fmean
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from tokenprune.errors import BudgetError, UnsupportedModel
from tokenprune.family import Portable, Request
from tokenprune.latency import LatencyTable
from tokenprune.method import Method
from tokenprune.recording import Forward, Recording
from tokenprune.state import constant_in_graphs, in_backward
from tokenprune.windows.costs import Probe, WindowCosts
from tokenprune.windows.here import Pass, finish, here
from tokenprune.windows.host import WindowsHost
from tokenprune.windows.lesson import WindowLesson
from tokenprune.windows.plan import Plan, by_cost, by_ratios, by_share, by_shares, refuse_empty, shares_of
from tokenprune.windows.site import BlockSite
from tokenprune.windows.tiling import Grid


class WindowsPatch(Portable):
    """What a patch knows for as long as it is on: plain data and the sites, no module but learned parts.

    active: whether anything is left out (not at a budget of 1.0). entered: the first grid of the last forward. seen: of
    an adaptive method, {block: windows computed of each image} of the last forward. drawn: of a method that draws
    shares, the plan of the last one. learned: the learned parts by stage, None for a method that learns nothing.
    lesson: of a training forward, in which all windows are computed.
    """

    def __init__(self, host: WindowsHost, adapter: str, method: Method, request: Request) -> None:
        self.key = uuid4().hex
        self.adapter = adapter
        self.method = method
        self.budget = request.budget
        self.active = not request.budget.is_full
        self.layouts = tuple(block.layout for block in host.blocks)
        self.stages = 1 + max(layout.stage for layout in self.layouts)
        self.shares: dict[int, float] | None = None
        if self.budget.kind == "schedule":
            self.shares = shares_of(self.budget, self.layouts, host.depth)
        self.ratios = self._published()
        self.usual = self.entered = host.grid
        self.image = host.image
        self.outside = host.outside
        self.skipped = host.skipped
        self.costs: WindowCosts | None = None
        self.plans: dict[Grid, Plan] = {}
        self.probe: Probe | None = None
        self.seen: dict[int, tuple[int, ...]] = {}
        self.drawn = Plan({}, {})
        self.learned: nn.ModuleDict | None = None
        self.lesson: WindowLesson | None = None
        self.recordings: list[Recording] = []

    def _published(self) -> tuple[float, ...] | None:
        """The method's own share of windows left out in each block, where that is the budget."""
        ratios = self.method.window_ratios
        if self.budget.kind not in ("default", "own") or ratios is None or self.method.window_draw is not None:
            return None
        return ratios(self._depths())

    def share_of_cost(self, shares: Mapping[int, Tensor]) -> Tensor:
        """What a forward at the last size costs with these shares of the windows of each block, as a share of the
        unpatched one, [] with their gradients."""
        assert self.costs is not None
        grid = self.entered
        keep: Any = {index: share * self.layouts[index].windows(grid) for index, share in shares.items()}
        ratio: Any = self.costs.total(grid, keep) / self.costs.total(grid, {})
        return ratio  # type: ignore[no-any-return]

    def _depths(self) -> list[int]:
        """Blocks of each stage."""
        return [sum(layout.stage == stage for layout in self.layouts) for stage in range(self.stages)]

    def begin(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook: the first grid is there, by whichever entry point."""
        grid = (output.shape[1], output.shape[2]) if output.ndim == 4 else self.usual
        now, depth, site = here().now, here().depth, here().site
        if now is not None and now.patch is self and now.depth >= depth:
            finish(self)  # it was left by an exception; one that is less deep has this one in a hook
        forward, outer = None, here().now
        if self.recordings and not in_backward():
            forward = Forward(self.image or grid)
            for recording in self.recordings:
                recording.forwards.append(forward)
        if self.probe is not None:
            keep = dict.fromkeys(range(len(self.layouts)), 1)
        elif self.method.window_draw is not None:
            keep = self._draw(grid) if module.training else {}
        else:
            keep = self.keep(*grid) if self.active else {}
        here().now = Pass(self, grid, keep, forward, outer=outer, site=site, depth=depth)

    def start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the model is called."""
        here().depth += 1

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: the forward has ended, by a result or an exception."""
        now, depth = here().now, here().depth
        if now is not None and now.depth >= depth:
            finish(self)
        here().depth = max(0, depth - 1)

    def predicted(self, table: LatencyTable) -> dict[tuple[int, int], float]:
        """Time at each batch of `table` and the usual size, as a share of the unpatched one."""
        if self.unpredictable():
            return {}
        assert self.costs is not None
        plan, grid = self.plan(self.usual), self.usual
        ratio = self.costs.total(grid, plan.keep) / self.costs.total(grid, {})
        return table.predicted(self.method.name, grid[0] * grid[1], ratio, len(plan.keep))

    def mark(self, index: int, point: str) -> None:
        """A point of a counted forward."""
        if self.probe is not None:
            self.probe.mark(index, point)

    def keep(self, rows: int, columns: int) -> dict[int, int]:
        """{block: windows computed} at a first grid, solved once for each.

        Raises:
            BudgetError: the budget cannot be met at this size.
        """
        return self._keep(self.key, operator.index(rows), operator.index(columns))

    @constant_in_graphs
    def _keep(self, key: str, rows: int, columns: int) -> dict[int, int]:
        self.entered = rows, columns
        return self.plan((rows, columns)).keep

    def _draw(self, grid: Grid) -> dict[int, int]:
        assert self.method.window_draw is not None
        assert self.costs is not None
        if torch.compiler.is_compiling():
            raise UnsupportedModel(
                f"{self.method.name} computes other numbers of windows in each training step, and a graph is of one of"
                " them; train without torch.compile, and compile when it is done"
            )
        self.entered = grid
        self.drawn = by_ratios(self.method.window_draw(self._depths()), self.costs, grid)
        return self.drawn.keep

    def learned_part(self, stage: int, device: torch.device) -> nn.Module | None:
        """What was learned for a stage, on `device`, which the parts follow."""
        if self.learned is None:
            return None
        part = self.learned[str(stage)]
        if any(parameter.device != device for parameter in part.parameters()):
            self.learned.to(device)
        return part

    def plan(self, grid: Grid) -> Plan:
        """The plan for a first grid; of an adaptive method, the most windows."""
        if grid not in self.plans:
            self.plans[grid] = self._solve(grid)
        return self.plans[grid]

    def _solve(self, grid: Grid) -> Plan:
        assert self.costs is not None
        if self.shares is not None:
            return by_shares(self.shares, self.layouts, grid)
        if self.method.adaptive and self.budget.kind in ("flops", "default"):  # learned, and so no bound
            return Plan({index: layout.windows(grid) for index, layout in enumerate(self.layouts)}, {})
        if self.budget.kind == "flops":
            if not self.outside and grid != self.usual:
                raise BudgetError(
                    f"{self.budget} is solved for a first grid of {self.usual[0]} x {self.usual[1]}, and blocks without"
                    f" windows cost otherwise at {grid[0]} x {grid[1]}; use keep=, or make the model for that size"
                )
            plan = by_cost(self.budget, self.costs, grid)
        elif self.ratios is not None:
            plan = by_ratios(self.ratios, self.costs, grid)
        else:
            share = self.budget.value if self.budget.kind == "keep" else self.method.stack_share
            plan = by_share(share, self.costs, grid)
        if self.ratios is None or any(self.ratios):
            refuse_empty(plan, self.budget, self.layouts, grid)
        return plan

    def summary(self) -> dict[str, Any]:
        """The data of the report, at the size of the last forward."""
        assert self.costs is not None
        grid = self.entered
        plan = self._last(grid)
        means: dict[int, float] = {index: fmean(self.seen.get(index, (keep,))) for index, keep in plan.keep.items()}
        before, after = self.costs.total(grid, {}), self.costs.total(grid, means)
        notes = ["tokens out are those of the windows that a block computes; the others pass through it unchanged"]
        if self.method.window_draw is not None:
            notes.append("acts in training forwards alone, each with shares of its own: these are the last one's")
        if self.method.adaptive and not self.seen:
            notes.append("adaptive: these are the most windows; what is computed is known after a forward")
        if not self.outside and grid != self.usual:
            notes.append("multiply-adds outside of windows are taken to grow with the tokens")
        return {
            "method": self.method.name,
            "paper": self.method.paper,
            "family": self.adapter,
            "budget": str(self.budget),
            "tokens": grid[0] * grid[1],
            "flops_before": round(before),
            "flops_after": round(after),
            "flops_ratio": after / before,
            "places": [self._place(index, mean, grid) for index, mean in sorted(means.items())],
            "skipped": {**self.skipped, **plan.skipped},
            "notes": notes if self.active else [],
        }

    def _last(self, grid: Grid) -> Plan:
        """That of the last forward."""
        if not self.active:
            return Plan({}, {})
        return self.drawn if self.method.window_draw is not None else self.plan(grid)

    def _place(self, index: int, keep: float, grid: Grid) -> dict[str, Any]:
        layout = self.layouts[index]
        tokens, windows = layout.tokens(grid), layout.windows(grid)
        place = {
            "name": layout.name,
            "tokens_in": tokens,
            "tokens_out": round(tokens * keep / windows),
            "windows_in": windows,
            "windows_out": round(keep, 1) if index in self.seen else keep,
        }
        if index in self.seen:
            place.update(fewest=min(self.seen[index]), most=max(self.seen[index]))
        return place


def attach(host: WindowsHost, patch: WindowsPatch) -> None:
    """Put the patch on the host's model."""
    for index, block in enumerate(host.blocks):
        BlockSite(patch, index).attach(block)
    host.entry.register_forward_hook(patch.begin)
    host.model.register_forward_pre_hook(patch.start, prepend=True)
    host.model.register_forward_hook(patch.end, always_call=True)
