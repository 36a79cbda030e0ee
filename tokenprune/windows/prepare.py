"""Whether a method can be on a model of windows, and its patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from tokenprune.errors import BudgetError, UnsupportedMethod, UnsupportedModel
from tokenprune.family import Request
from tokenprune.flop_count import FlopCount
from tokenprune.ghost import ghost
from tokenprune.method import Method, refuse_recover
from tokenprune.windows.costs import Probe, WindowCosts, window_costs
from tokenprune.windows.here import here
from tokenprune.windows.host import Block, WindowsHost
from tokenprune.windows.learned import learned_by_stage
from tokenprune.windows.patch import WindowsPatch, attach
from tokenprune.windows.tiling import Chosen, Tiling, choose

Describe = Callable[[nn.Module], WindowsHost]


def chooses_windows(method: Method) -> bool:
    """Whether a method works on whole windows: one for them, or that works as it does on tokens, as it learns nothing,
    merges none and does not look at attention, all of which stays in a window."""
    return "windows" in method.needs or not (
        method.learned or method.adaptive or method.merges or method.proportional or method.needs - {"windows"}
    )


def prepare(describe: Describe, model: nn.Module, adapter: str, method: Method, request: Request) -> WindowsPatch:
    """The patch of a model of windows, its budget solved at the usual input; nothing is attached yet.

    Raises:
        UnsupportedModel: a block's forward is replaced, or run through its own parts it gives another output.
        UnsupportedMethod: the request is of another kind of model.
        BudgetError: the budget cannot be met.
    """
    host = describe(model)
    if not host.blocks:
        why = "; ".join(f"{name} {reason}" for name, reason in list(host.skipped.items())[:3])
        raise UnsupportedModel(f"no block of this {type(model).__name__} stays in windows: {why}")
    _check_request(method, request, model)
    patch = WindowsPatch(host, adapter, method, request)
    for block in host.blocks:
        if "forward" in vars(block.module):
            raise UnsupportedModel(
                f"the forward of {block.layout.name} is replaced on the instance (offloading?), and would not know of"
                " windows; patch first"
            )
        _check(host, block)
    if patch.active and method.learned is not None:
        patch.learned = learned_by_stage(host, patch, request.weights)
    patch.costs = _count(describe, patch, model)
    if patch.active and method.window_draw is None:
        patch.plan(host.grid)
    return patch


def refuse_runs(method: Method, request: Request, name: str) -> None:
    """Raise UnsupportedMethod for what a model of windows has not: steps, stacks and a prompt."""
    refuse_recover(method, name)
    if request.steps is not None:
        raise UnsupportedMethod(f"steps= is for denoising runs, and {name} has none; use schedule={{block: share}}")
    if request.positions is not None:
        raise UnsupportedMethod(f"positions= is of the tokens of a prompt, and {name} has none; leave it out")
    if request.restore is not None:
        raise UnsupportedMethod(f"restore= is for tokens that left, and those of {name} are all there; leave it out")


def _check_request(method: Method, request: Request, model: nn.Module) -> None:
    name = type(model).__name__
    refuse_runs(method, request, name)
    budget = request.budget
    if budget.kind == "tokens":
        raise BudgetError(f"{budget}: behind each block all tokens are there again; use keep= or flops=")
    if getattr(method.schedule, "at", None) is not None:
        raise BudgetError(f"places= names blocks behind which tokens are gone, and {name} has none; use schedule=")
    if method.window_draw is not None and budget.kind != "default":
        raise BudgetError(f"{budget}: {method.name} draws the shares of each training step itself here; leave it out")
    if budget.kind == "own" and budget.option == "r":
        raise BudgetError(f"{budget} counts tokens that leave a block, and behind these all are there; use keep=")


class _Everything:
    """In front of a block: all windows are computed, one by one."""

    def choose(self, x: Tensor, tiling: Tiling) -> Chosen:
        grid = x.shape[1], x.shape[2]
        index = tiling.index(grid, x.device)
        return choose(tiling, grid, index, torch.arange(len(index), device=x.device).expand(x.shape[0], -1))

    def attended(self) -> None:
        pass


def _check(host: WindowsHost, block: Block) -> None:
    """Compare the block, run window by window, with itself on a small random input."""
    weight = next(p for p in host.model.parameters() if p.is_floating_point())
    if weight.device.type == "meta":
        return
    plain, swapped = ghost(block.module), ghost(block.module)
    shape = host.check(plain)
    host.check(swapped)
    swapped.__class__ = block.swapped
    generator = torch.Generator(device=weight.device).manual_seed(0)
    x = torch.randn(*shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
    with torch.no_grad():
        expected = plain(x)
        here().site = _Everything()
        try:
            got = swapped(x)
        finally:
            here().site = None
    tolerance = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if not torch.allclose(got, expected, rtol=0, atol=tolerance):
        raise UnsupportedModel(f"{block.layout.name}, run window by window, gives another output than it does whole")


def _count(describe: Describe, patch: WindowsPatch, model: nn.Module) -> WindowCosts:
    host = describe(ghost(model, on_meta=True))
    shadow = WindowsPatch(host, patch.adapter, patch.method, Request(patch.budget))
    if patch.learned is not None:
        shadow.learned = cast(nn.ModuleDict, ghost(patch.learned, on_meta=True))
    attach(host, shadow)

    def run(probe: Probe, batch: int) -> int:
        shadow.probe = probe
        with torch.no_grad(), FlopCount() as probe.count:
            host.model(host.example(batch))
        return probe.count.multiply_adds

    return window_costs(run, patch.layouts, host.grid, dense=host.dense)
