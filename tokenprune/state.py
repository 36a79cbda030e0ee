"""The state of one forward: which tokens are left, found again when a block is re-run in backward.

Nothing here lives in a module. What a block hands to the next is keyed by the storage of the hidden tensor, so that
gradient checkpointing finds it again (a re-entrant re-run sees a detached tensor on the same storage, maybe in another
thread), two forwards never mix, and it dies with the tensor. While torch.compile traces, storages have no identity and
the state rides on the traced tensor instead.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from tokenprune.host import Caught
    from tokenprune.ragged import Pack
    from tokenprune.recording import Forward
    from tokenprune.site import Site


@dataclass(frozen=True, eq=False)
class TokenState:
    """The prunable tokens between two blocks.

    entering: tokens that entered the first place. tokens: how many are left, n. origin: [B, n] original patch of each
    (None: all, in order). sizes: [B, n] patches in each (None: one each). source: [B, entering] position that holds
    each original patch, -1 where it was dropped (for recordings). stand_in: [B, entering] position whose value
    restores each original patch (for dense outputs). reduced: the reduced tensor behind a restored one. forward: the
    recording that follows this forward. dense: blocks whose output is restored in this forward. last: the block behind
    which the model's own tail follows. pack: where the images keep different numbers of tokens, which then holds origin
    and sizes; tokens is the largest number, and source and stand_in hold rows of the pack.
    """

    entering: int
    tokens: int
    origin: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    stand_in: Tensor | None = None
    reduced: Tensor | None = None
    forward: Forward | None = None
    dense: frozenset[int] = frozenset()
    last: int | None = None
    pack: Pack | None = None

    def origins(self, x: Tensor) -> Tensor:
        """[B, n] original patch of each token of x [B, N, C]."""
        if self.origin is not None:
            return self.origin
        return torch.arange(self.tokens, device=x.device).expand(x.shape[0], -1)


class Entry:
    """How the model was entered. whole: by its forward, and not yet passed on to its features. dense: blocks whose
    output is restored. grid: (rows, columns) of the input, where it is recorded. last: the last block that the model
    has. pack: how the tokens lay behind it, where the images had different numbers of them.

    An object that is changed in place: torch.compile loses plain values that are set anew in thread-local storage.
    """

    def __init__(self, dense: frozenset[int], *, whole: bool, grid: tuple[int, int] | None = None) -> None:
        self.whole = whole
        self.dense = dense
        self.grid = grid
        self.last: int | None = None
        self.pack: Pack | None = None


class Flow(threading.local):
    """What the block that runs now in this thread has captured, emptied when the block ends; and how the forward was
    entered, emptied when the entry point returns."""

    site: Site | None = None
    state: TokenState | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    inputs: Caught | None = None
    values: Caught | None = None
    bias: Tensor | None = None
    rope: Tensor | None = None
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    groups: list[Any] | None = None
    attended: bool = True
    left: tuple[Site, TokenState, tuple[int, int]] | None = None
    entry: Entry | None = None


FLOW = Flow()
_STATES: MutableMapping[Any, TokenState] = WeakIdKeyDictionary()
_ATTRIBUTE = "_tokenprune_state"


def remember(x: Tensor, state: TokenState) -> None:
    """Tie `state` to the hidden tensor x."""
    if torch.compiler.is_compiling() or _is_wrapped(x):
        setattr(x, _ATTRIBUTE, state)
    else:
        _STATES[x.untyped_storage()] = state


def recall(x: Tensor) -> TokenState | None:
    """The state tied to the hidden tensor x, or None."""
    if torch.compiler.is_compiling() or _is_wrapped(x):
        return getattr(x, _ATTRIBUTE, None)
    return _STATES.get(x.untyped_storage())


def in_backward() -> bool:
    """Whether a block runs because gradient checkpointing runs it once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_wrapped(x: Tensor) -> bool:
    """Whether x is a tensor of torch.func's transforms, which has no storage of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
