"""NarrowSite: the hooks on one block, between which its MLP runs on fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.kernels.merge import gather
from tokenprune.narrow.host import Captured, NarrowBlock, window_grid, window_index, window_places
from tokenprune.of_thread import OfThread
from tokenprune.ragged import Repacking, pack_batch, repack
from tokenprune.recording import Forward, PlaceRecord
from tokenprune.reduction import Reduction
from tokenprune.state import in_backward
from tokenprune.tables import positions, table
from tokenprune.windows.tiling import Grid

if TYPE_CHECKING:
    from tokenprune.narrow.patch import NarrowPatch


@dataclass(eq=False)
class Running:
    """The block that runs now in a thread. caught: by its tap. reduction: through which its MLP's tokens went, of
    windows [B W, T, C]; images: B. outer: the block of another forward, in a hook of which this one runs."""

    site: NarrowSite
    block: nn.Module
    grid: Grid
    outer: Running | None
    caught: Tensor | None = None
    reduction: Reduction | Repacking | None = None
    images: int = 0


class _Here:
    """depth: how many patched models' own calls run now, one within the other. forwards: {id of a patch: (depth,
    recording) of the forwards of its model where one is wanted, each in a hook of the one before}."""

    def __init__(self) -> None:
        self.depth = 0
        self.running: Running | None = None
        self.forwards: dict[int, list[tuple[int, Forward]]] = {}


_THREAD = OfThread(_Here)


def here() -> _Here:
    """What this thread runs."""
    return _THREAD.value


class NarrowSite:
    """Block `index` of a patched model."""

    def __init__(self, patch: NarrowPatch, index: int, block: NarrowBlock) -> None:
        self.patch = patch
        self.index = index
        self.layout = block.layout
        self.read = block.read
        self.window = window_grid(block.layout, block.layout.grid(patch.grid))

    def attach(self, block: NarrowBlock) -> None:
        """Put the hooks on the block."""
        block.module.register_forward_pre_hook(self.enter, prepend=True)
        block.module.register_forward_hook(self.leave, always_call=True)
        if self.patch.method.needs:
            if block.tap_input:
                block.tap.register_forward_pre_hook(self.catch_input)
            else:
                block.tap.register_forward_hook(self.catch)
        first, last = block.span
        first.register_forward_pre_hook(self.narrow)
        last.register_forward_hook(self.widen, prepend=True)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the block starts."""
        x: Tensor = args[0]
        grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else self.layout.grid(self.patch.grid)
        here().running = Running(self, module, grid, here().running)
        self.patch.mark(self.index, "enter")

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: it has ended, by a result or an exception."""
        running = self._running()
        if running is not None:
            here().running = running.outer
        self.patch.mark(self.index, "leave")

    def catch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook: the tap has put out what queries, keys and values are in."""
        running = self._running()
        if running is not None:
            running.caught = output.detach()

    def catch_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the tap is given what queries, keys and values are computed from."""
        running = self._running()
        if running is not None:
            running.caught = args[0].detach()

    def narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        """Hook: the MLP starts, on the tokens that the method keeps or merges."""
        running, keep = self._running(), self.patch.keep.get(self.index)
        if running is None or keep is None or self.layout.tiling.padded(running.grid):
            self.patch.mark(self.index, "chosen")
            return None
        x: Tensor = args[0]
        if x.shape[1] != running.grid[0] * running.grid[1]:
            raise UnsupportedModel(
                f"{self.layout.name} has {x.shape[1]} tokens of a grid of {running.grid[0]} x {running.grid[1]} (masked"
                " units?); unpatch the model for that"
            )
        index = self._table(window_index, running.grid, x)
        windows = x.index_select(1, index.flatten()).reshape(-1, index.shape[1], x.shape[-1])
        with torch.no_grad():
            reduction = self._reduction(running, windows.detach(), index, keep)
        self.patch.mark(self.index, "chosen")
        if reduction is None:
            return None
        running.reduction, running.images = reduction, x.shape[0]
        forwards = here().forwards.get(id(self.patch)) if self.patch.recordings and not in_backward() else None
        if forwards:
            forwards[-1][1].places.append(self._recorded(running, index))
        if isinstance(reduction, Repacking):
            return (reduction(windows.flatten(0, 1)).unsqueeze(0),)
        return (reduction(windows).reshape(x.shape[0], -1, x.shape[-1]),)

    def widen(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook: it has ended; each token takes what the one that stands for it has gained, a dropped one nothing."""
        self.patch.mark(self.index, "widened")
        running = self._running()
        reduction = running.reduction if running is not None else None
        if running is None or reduction is None:
            return None
        running.reduction = None
        channels, count = output.shape[-1], running.grid[0] * running.grid[1]
        if isinstance(reduction, Repacking):
            gained = output[0][reduction.place.clamp(min=0)]
            windows = torch.where((reduction.place >= 0).unsqueeze(-1), gained, 0.0).to(output.dtype)
        else:
            out = output.reshape(-1, reduction.tokens, channels)
            none = out.new_zeros(out.shape[0], self.layout.tiling.area, channels)
            windows = reduction.bring_back(out, torch.zeros_like(out), none)
        windows = windows.reshape(running.images, count, channels)
        return windows.index_select(1, self._table(window_places, running.grid, output))

    def _running(self) -> Running | None:
        running = here().running
        return running if running is not None and running.site is self else None

    def _table(self, make: Any, grid: Grid, like: Tensor) -> Tensor:
        return table(make, self.layout.tiling, grid, self.layout.order, like=like)

    def _reduction(self, running: Running, windows: Tensor, index: Tensor, keep: int) -> Reduction | Repacking | None:
        """Of the tokens of windows [B W, T, C]; None where only the choice is counted."""
        method = self.patch.method
        captured = Captured()
        if running.caught is not None:
            captured = self.read(running.block, running.caught, index, running.grid, method.needs)
            running.caught = None
        record = AttentionRecord(
            hidden=windows,
            origin=positions(index.shape[1], windows).expand(windows.shape[0], -1),
            num_prefix_tokens=0,
            place=self.layout.number,
            depth=self.patch.depth,
            first=self.patch.layouts[min(self.patch.keep)].number,
            grid=self.window,
            has_class_token=False,
            scale=captured.scale,
            queries=captured.queries,
            keys=captured.keys,
            values=captured.values,
            bias=captured.bias,
        )
        if not method.adaptive:
            return method.reduce(record, keep)
        ragged = method.reduce_ragged(record, keep)
        if windows.is_meta:
            return None
        if torch._C._get_tracing_state() is not None:
            raise UnsupportedMethod(
                f"{method.name} keeps a different number of tokens in each window: not to be traced"
            )
        repacking = repack(pack_batch(record.origin, None, 0), [ragged], merges=method.merges)
        if windows.shape[0] and not in_backward():
            self.patch.left[self.index] = repacking.rows.shape[0] * index.shape[0] / windows.shape[0]
        return repacking

    def _recorded(self, running: Running, index: Tensor) -> PlaceRecord:
        """Where the tokens of the grid went; those of a window lie behind those of the windows before it."""
        reduction, (count, area) = running.reduction, index.shape
        sizes = None
        if isinstance(reduction, Repacking):
            kept, source, sizes = _of_pack(reduction, running.images)
        else:
            assert isinstance(reduction, Reduction)
            kept, source = reduction.follow(None), reduction.source(area)
            if reduction.moved is not None:
                sizes = reduction.merged_sizes(torch.ones_like(kept[:, :1]).expand(-1, area))
                sizes = sizes.reshape(running.images, -1)
            first = torch.arange(source.shape[0], device=source.device).unsqueeze(1) % count
            source = torch.where(source < 0, -1, source + first * kept.shape[1])
            kept = (kept + first * area).reshape(running.images, -1)
            source = source.reshape(running.images, -1)
        source = source.index_select(1, self._table(window_places, running.grid, kept))
        kept = torch.where(kept < 0, -1, index.flatten()[kept.clamp(min=0)])
        grid = running.grid
        if self.layout.order is not None:
            order = torch.tensor(self.layout.order, device=kept.device)
            source, grid = source[:, order], self.layout.image or grid
            kept = torch.where(kept < 0, -1, order.argsort()[kept.clamp(min=0)])
        return PlaceRecord(self.layout.name, kept, source, sizes, grid)


def _of_pack(repacking: Repacking, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """kept [B, K], source [B, W T] and sizes [B, K] by image, K of the one that keeps most, the others' last -1."""
    leaves = repacking.leaves().reshape(images, -1)
    counts, tokens = leaves.sum(1), leaves.shape[1]
    order = torch.where(leaves, positions(tokens, leaves), tokens).sort(1).values[:, : int(counts.max())]
    kept = torch.where(order < tokens, order, -1)
    rank = leaves.cumsum(1) - 1
    base = torch.arange(images, device=leaves.device).unsqueeze(1) * tokens
    place = repacking.place.reshape(images, -1)
    stands = torch.where(place < 0, -1, repacking.rows[place.clamp(min=0)])  # row before of the one that stands for it
    source = torch.where(stands < 0, -1, gather(rank, (stands - base).clamp(min=0)))
    if repacking.after.sizes is None:
        return kept, source, None
    own = torch.where(leaves, repacking.after.sizes[place.clamp(min=0)], 0)
    sizes = gather(own, kept.clamp(min=0)).masked_fill(kept < 0, 0)
    return kept, source, sizes
