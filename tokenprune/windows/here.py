"""What runs now in a thread: the forward, the block, and which windows it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tokenprune.of_thread import OfThread
from tokenprune.recording import Forward
from tokenprune.windows.tiling import Chosen, Grid, Tiling

if TYPE_CHECKING:
    from tokenprune.windows.patch import WindowsPatch


class Running(Protocol):
    """What stands in front of a block."""

    def choose(self, x: Tensor, tiling: Tiling) -> Chosen | None:
        """The windows of x [B, H, W, C] that the block computes; None for all."""

    def attended(self) -> None:
        """The point between attention and MLP."""


@dataclass(eq=False)
class Pass:
    """One forward. grid: the first one. keep: {block: windows computed}, those left whole are not in it. scores:
    {stage: [B, n] what each token counts, None where the method does not look}. computed: of a method that nests its
    choices, {(grid, tiling): stage -> [B, W] windows that any of its blocks has computed}. forward: the recording of
    it, where one is wanted. outer, site: the forward and the block in a hook of which this one runs, of this or another
    model. depth: see `_Here`."""

    patch: WindowsPatch
    grid: Grid
    keep: dict[int, int]
    forward: Forward | None = None
    scores: dict[int, Tensor | None] = field(default_factory=dict)
    computed: dict[tuple[Grid, Tiling], dict[int, Tensor]] = field(default_factory=dict)
    outer: Pass | None = None
    site: Running | None = None
    depth: int = 0


class _Here:
    """depth: how many patched models' own calls run now, one within the other."""

    def __init__(self) -> None:
        self.depth = 0
        self.now: Pass | None = None
        self.site: Running | None = None


_THREAD = OfThread(_Here)


def here() -> _Here:
    """What this thread runs."""
    return _THREAD.value


def finish(patch: WindowsPatch) -> None:
    """The forward of `patch` has ended, if it has not before."""
    now = here().now
    if now is not None and now.patch is patch:
        here().now, here().site = now.outer, now.site


def on_windows_here(
    x: Tensor, tiling: Tiling, attend: Callable[[Chosen, Tensor], Tensor], feed: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """x [B, H, W, C] behind a block that computes a part of its windows; None where the block that runs now in this
    thread computes all.

    attend: (what is computed, its tokens [B K, T, C]) -> the tokens behind the attention, by image [B, K T, C]. feed:
    those behind the MLP.
    """
    site = here().site
    chosen = None if site is None else site.choose(x, tiling)
    if site is None or chosen is None:
        return None
    if chosen.windows.shape[1] == 0:  # of no image
        return x
    tokens = attend(chosen, chosen.take(x))
    site.attended()
    return chosen.give_back(feed(tokens), x)
