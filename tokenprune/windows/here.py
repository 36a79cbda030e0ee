"""What runs now in a thread: the forward, the block, and which windows it computes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

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
    {stage: [B, n] what each token counts, None where the method does not look}. forward: the recording of it, where one
    is wanted. outer: the forward of another model, in a hook of which this one runs."""

    patch: WindowsPatch
    grid: Grid
    keep: dict[int, int]
    forward: Forward | None = None
    scores: dict[int, Tensor | None] = field(default_factory=dict)
    outer: Pass | None = None


class _Here:
    def __init__(self) -> None:
        self.now: Pass | None = None
        self.site: Running | None = None


class _OfThread(threading.local):
    """Made once and changed in place: torch.compile does not see what is set anew in a thread's storage."""

    def __init__(self) -> None:
        self.here = _Here()


_THREAD = _OfThread()


def here() -> _Here:
    """What this thread runs."""
    return _THREAD.here


def finish(patch: WindowsPatch) -> None:
    """The forward of `patch` has ended, if it has not before."""
    now = here().now
    if now is not None and now.patch is patch:
        here().now = now.outer


def windows_here(x: Tensor, tiling: Tiling) -> Chosen | None:
    """The windows of x [B, H, W, C] that the block that runs now in this thread computes; None for all."""
    site = here().site
    return None if site is None else site.choose(x, tiling)


def attended_here() -> None:
    """The point between attention and MLP."""
    site = here().site
    if site is not None:
        site.attended()
