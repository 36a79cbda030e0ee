"""What runs now in a thread: the site of a block or of a part of one, and what it has caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tokenprune.denoisers.host import Arguments
from tokenprune.of_thread import OfThread
from tokenprune.reduction import Reduction

if TYPE_CHECKING:
    from tokenprune.denoisers.patch import DenoiserPatch


class Running(Protocol):
    """What stands in front of a block or of a part of one."""

    def run(self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Any:
        """The module on the tokens that are chosen for it."""


class _Here:
    """The site of the block that runs now in a thread, and what it has caught. hooks: names of what it hooks inside of
    the block."""

    def __init__(self) -> None:
        self.site: Running | None = None
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.cross_queries: Tensor | None = None
        self.cross_keys: Tensor | None = None
        self.reduction: Reduction | None = None
        self.tokens = 0
        self.hooks = ""

    def clear(self) -> None:
        self.hooks = ""
        self.site = self.queries = self.keys = self.cross_queries = self.cross_keys = self.reduction = None

    @property
    def caught(self) -> tuple[Tensor | None, ...]:
        """What is caught, of each kind."""
        return self.queries, self.keys, self.cross_queries, self.cross_keys

    @caught.setter
    def caught(self, caught: tuple[Tensor | None, ...]) -> None:
        self.queries, self.keys, self.cross_queries, self.cross_keys = caught


_THREAD = OfThread(_Here)


def here() -> _Here:
    """What this thread runs."""
    return _THREAD.value


def run_here(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Arguments) -> Any:
    """Run a block's own `forward` on the tokens that are chosen for it."""
    site = here().site
    return forward(*args, **kwargs) if site is None else site.run(module, forward, args, kwargs)


class Catch:
    """Hook on a projection: keeps its output as `kind` until the block ends. A copy, as CogVideoX and CogView4 write
    the rotary embedding into it."""

    def __init__(self, patch: DenoiserPatch, kind: str) -> None:
        self.patch = patch
        self.kind = kind

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hook."""
        setattr(here(), self.kind, output.detach().clone())
