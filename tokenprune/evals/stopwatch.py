"""A clock that runs while some modules of a model do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn


class Stopwatch:
    """`watch` modules, none inside another; called, it says for how long they have run, so that it can be handed over
    as a clock itself."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.spent = self.started = 0.0

    def watch(self, module: nn.Module, *, inside: bool = False) -> None:
        """Count the forwards of `module`; `inside`: without the hooks that are on it now."""
        module.register_forward_pre_hook(self._start, prepend=not inside)
        module.register_forward_hook(self._stop, prepend=inside)

    def _start(self, module: nn.Module, args: Any) -> None:
        self.started = self.clock()

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        self.spent += self.clock() - self.started

    def __call__(self) -> float:
        return self.spent
