"""Site: the hooks on one block of windows, and the choice of those that it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.ragged import RaggedReduction
from tokenprune.recording import PlaceRecord
from tokenprune.reduction import Reduction
from tokenprune.state import in_backward, recall, remember
from tokenprune.tables import positions, table
from tokenprune.windows.here import Pass, finish, here
from tokenprune.windows.host import Block, Layout
from tokenprune.windows.lesson import WindowLesson
from tokenprune.windows.tiling import Chosen, Grid, Tiling, choose, choose_packed

if TYPE_CHECKING:
    from tokenprune.windows.patch import WindowsPatch


class BlockSite:
    """Block `index` of a patched model."""

    def __init__(self, patch: WindowsPatch, index: int) -> None:
        self.patch = patch
        self.index = index
        self.layout = patch.layouts[index]

    def attach(self, block: Block) -> None:
        """Put the hooks on the block and exchange its class."""
        block.module.register_forward_pre_hook(self.enter, prepend=True)
        block.module.register_forward_hook(self.leave, always_call=True)
        block.module.__class__ = block.swapped

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Hook: the block starts."""
        here().site = self
        self.patch.mark(self.index, "enter")

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: it has ended, by a result or an exception."""
        here().site = None
        self.patch.mark(self.index, "leave")
        ended = self.index == len(self.patch.layouts) - 1 or output is None  # by an exception
        if ended and not in_backward():
            finish(self.patch)  # nothing is left of an entry point that has no end

    def attended(self) -> None:
        """The point between attention and MLP."""
        self.patch.mark(self.index, "attended")

    def choose(self, x: Tensor, tiling: Tiling) -> Chosen | None:
        """The windows of x [B, H, W, C] that the block computes, None for all."""
        if in_backward() and (known := recall(x)) is not None:  # gradient checkpointing runs the block once more
            chosen: Chosen | None = known[0]
            return chosen
        now = here().now
        own = now is not None and now.patch is self.patch
        if in_backward() and not own and any(self.index in plan.keep for plan in self.patch.plans.values()):
            raise UnsupportedModel(
                f"gradient checkpointing runs {self.layout.name} once more without knowing which windows it computed;"
                " checkpoint each block by itself (set_grad_checkpointing) or the whole model, not a stage"
            )
        chosen = self._chosen_in(now, x, tiling) if now is not None and own else None
        self.patch.mark(self.index, "chosen")
        if torch.is_grad_enabled() or x.requires_grad:
            remember(x, (chosen,))
        return chosen

    def _chosen_in(self, now: Pass, x: Tensor, tiling: Tiling) -> Chosen | None:
        keep = now.keep.get(self.index)
        if keep is None:
            return None
        rows, columns = self.layout.grid(now.grid)
        if (x.shape[1], x.shape[2]) != (rows, columns):
            raise UnsupportedModel(
                f"{self.layout.name} is given {x.shape[1]} x {x.shape[2]} tokens, and {rows} x {columns} are those of"
                " this input (masked units, or a block called by itself?); unpatch the model for that"
            )
        if tiling != self.layout.tiling:
            raise UnsupportedModel(
                f"the windows of {self.layout.name} have changed since it was patched (set_input_size?); patch the"
                " model again"
            )
        return self._chosen(now, x.detach(), keep)

    def _chosen(self, now: Pass, x: Tensor, keep: int) -> Chosen:
        tiling, grid = self.layout.tiling, (x.shape[1], x.shape[2])
        index = table(Tiling.index, tiling, grid, like=x)
        record, scores = self._scored(now, x, index)
        if self.patch.lesson is not None:
            assert scores is not None
            alive = self._masked(self.patch.lesson, scores, grid)
            return replace(choose(tiling, grid, index, record.origin), alive=alive)
        if self.patch.probe is not None and self.patch.method.adaptive:  # which costs as much as any other
            return choose(tiling, grid, index, record.origin[:, :keep])
        earlier = None
        if self.patch.method.window_nested and scores is not None:
            earlier = now.computed.setdefault((grid, tiling), {})
            scores = _within(scores, earlier, self.layout.stage)
        selected = self.patch.method.select(scores, record, keep)
        if isinstance(selected, RaggedReduction):
            kept = selected.target == record.origin
            self._count(kept)
            if earlier is not None:
                stage = self.layout.stage
                earlier[stage] = kept | earlier[stage] if stage in earlier else kept
            chosen = choose_packed(tiling, grid, index, kept)
        else:
            self._check(selected, keep)
            chosen = choose(tiling, grid, index, selected.kept)
        if now.forward is not None:
            now.forward.places.append(_record(self.layout, chosen.computed(len(x), grid[0] * grid[1]), grid))
        return chosen

    def _check(self, selected: Reduction, keep: int) -> None:
        if selected.kept.shape[1] != keep or not selected.is_index:
            raise UnsupportedMethod(
                f"{self.patch.method.name} is asked for {keep} windows of {self.layout.name}; here it must drop the"
                " others, and no fewer or more"
            )

    def _count(self, kept: Tensor) -> None:
        """Note how many windows of each image are computed, `kept` [B, W]."""
        if not torch.compiler.is_compiling():
            self.patch.seen[self.index] = tuple(kept.sum(1).tolist())

    def _masked(self, lesson: WindowLesson, scores: Tensor, grid: Grid) -> Tensor:
        """[B, W] masks of a training forward, the same in the blocks of a stage with the same windows."""
        assert self.patch.method.window_mask is not None
        key = self.layout.stage, self.layout.tiling
        lesson.blocks[self.index], lesson.grids[self.layout.stage] = key, grid
        if key not in lesson.alive:
            draw = torch.ones_like if lesson.whole else self.patch.method.window_mask
            before = lesson.alive_before(key) if self.patch.method.window_nested else None
            own = draw(scores)
            lesson.confidences[key], lesson.alive[key] = scores, own if before is None else own * before
        return lesson.alive[key]

    def _scored(self, now: Pass, x: Tensor, index: Tensor) -> tuple[AttentionRecord, Tensor | None]:
        """The windows with the tokens index [W, T] (their number where it is padding), and their scores [B, W]. Tokens
        are scored in front of the first reduced block of a stage."""
        method, stage, grid = self.patch.method, self.layout.stage, (x.shape[1], x.shape[2])
        hidden = x.flatten(1, 2)
        record = AttentionRecord(
            hidden=hidden,
            origin=positions(hidden.shape[1], x).expand(x.shape[0], -1),
            num_prefix_tokens=0,
            place=stage,
            depth=self.patch.stages,
            grid=grid,
            has_class_token=False,
            learned=self.patch.learned_part(stage, x.device),
        )
        if stage not in now.scores:
            now.scores[stage] = None if method.score is None else method.score(record)
        tokens = now.scores[stage]
        scores = None
        if tokens is not None:
            each = functional.pad(tokens, (0, 1))[:, index.flatten()].view(-1, *index.shape)
            if method.window_score == "mean":
                scores = each.sum(2) / (index < hidden.shape[1]).sum(1)
            else:
                scores = torch.linalg.vector_norm(each, dim=2)
        windows = positions(index.shape[0], x).expand(x.shape[0], -1)
        tiles = self.layout.tiling.tiles(grid)
        return replace(record, hidden=hidden[:, :0], origin=windows, grid=tiles), scores


def _within(scores: Tensor, earlier: Mapping[int, Tensor], stage: int) -> Tensor:
    """Scores [B, W] of a stage, without those of windows that the last of the `earlier` stages has left out."""
    before = max((other for other in earlier if other < stage), default=None)
    return scores if before is None else scores.masked_fill(~earlier[before], -torch.inf)


def _record(layout: Layout, computed: Tensor, grid: Grid) -> PlaceRecord:
    """Which tokens of a grid are `computed`, [B, n]. Those of an image with fewer of them than another end in -1."""
    count = grid[0] * grid[1]
    if layout.order is not None:
        computed, grid = computed[:, list(layout.order)], layout.image or grid
    places = torch.arange(count, device=computed.device).expand_as(computed)
    kept = places.masked_fill(~computed, count).sort(dim=1).values[:, : int(computed.sum(1).max())]
    source = (computed.cumsum(1) - 1).masked_fill(~computed, -1)
    return PlaceRecord(layout.name, kept.masked_fill(kept == count, -1), source, None, grid)
