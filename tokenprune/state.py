"""The state of one forward: which tokens are left, found again when a block is re-run in backward.

Nothing here lives in a module. What a block hands to the next is kept on the storage of the hidden tensor, so that
gradient checkpointing finds it again (a re-entrant re-run sees a detached tensor on the same storage, maybe in another
thread), two forwards never mix, and it dies with the tensor. While torch.compile traces, storages have no identity and
the state rides on the traced tensor instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tokenprune.tables import is_wrapped, positions

if TYPE_CHECKING:
    from tokenprune.host import Caught, RopeTable, Stretch
    from tokenprune.ragged import Pack
    from tokenprune.recording import Forward
    from tokenprune.reduction import Reduction
    from tokenprune.row_parts import Part
    from tokenprune.site import Site


@dataclass(frozen=True, eq=False)
class TokenState:
    """The prunable tokens between two blocks.

    entering: tokens that entered the first place. tokens: how many are left, n. origin: [B, n] original patch of each
    (None: all, in order). sizes: [B, P + n] patches in each, behind ones for the prefix tokens (None: one each).
    source: [B, entering] position that holds each original patch, -1 where it was dropped (for recordings). undo: for
    each place so far, what brings its leaving tokens back to those that entered it (for dense outputs). reduced: the
    reduced tensor behind a restored one, that had been changed in place `version` times (None: not known). grid: (rows,
    columns) of the entering tokens, None where they fill none. forward: the recording that follows this forward. dense:
    blocks whose output is restored in this forward. last: the block behind which the model's own tail follows. front:
    of how many tokens in front alone the last block's output is computed, None for all. recorded: whether gradients
    were recorded at every place so far.
    pack: where the images keep different numbers of tokens, which then holds origin and sizes; tokens is the largest
    number, source holds rows of the pack, and undo leads from pack to pack. counts: (block, tokens that left it of
    each image).
    parts: of images that lie in one row, those of each size, which then hold all but dense, last and reduced; entering
    and tokens are those of the row.
    drawn: of a hidden tensor in front of a first block that drops some, what was drawn there.
    alive: [B, n] masks of a training forward in which all tokens stay (see `tokenprune.masking`); source is then the
    position whose value a merged token takes.
    """

    entering: int
    tokens: int
    origin: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    undo: tuple[Callable[[Tensor], Tensor], ...] = ()
    reduced: Tensor | None = None
    version: int | None = None
    grid: tuple[int, int] | None = None
    forward: Forward | None = None
    dense: tuple[int, ...] = ()
    last: int | None = None
    front: int | None = None
    recorded: bool = True
    pack: Pack | None = None
    counts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    parts: tuple[Part, ...] = ()
    alive: Tensor | None = None
    drawn: Reduction | None = None

    def undone_by(self, back: Callable[[Tensor], Tensor]) -> TokenState:
        """The same behind one place more, that `back` undoes."""
        return replace(self, undo=(*self.undo, back), recorded=self.recorded and torch.is_grad_enabled())

    def origins(self, x: Tensor) -> Tensor:
        """[B, n] original patch of each token of x [B, N, C]."""
        if self.origin is not None:
            return self.origin
        return positions(self.tokens, x).expand(x.shape[0], -1)


@dataclass(eq=False)
class Entry:
    """How the model was entered. dense: blocks whose output is restored. whole: by its forward, and not yet passed on
    to its features. grid: (rows, columns) of the input, None where it has none. last: the last block that the model
    has. front: as in TokenState. pack: how the tokens lay behind the last block, where the images had different numbers
    of them. row: how images lie in one row. owner: the patch of that model. outer: entry and `left` of a forward in a
    hook of which this one runs."""

    dense: tuple[int, ...]
    whole: bool
    grid: tuple[int, int] | None
    last: int | None = None
    front: int | None = None
    pack: Pack | None = None
    row: tuple[Stretch, ...] | None = None
    owner: object = None
    outer: tuple[Entry | None, Any] = (None, None)


@dataclass(eq=False)
class Flow:
    """What the block that runs now in this thread has captured, emptied when the block ends; and how the forward was
    entered and what the last block left, emptied when the entry point returns.

    before: hidden states as they entered this block. front: of how many tokens in front alone its output is computed,
    None for all. Of a ragged batch also: the block's arguments, what each group of images captured where they ran one
    by one, and whether an attention has kept them apart.
    """

    site: Site | None = None
    state: TokenState | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    inputs: Caught | None = None
    values: Caught | None = None
    before: Tensor | None = None
    bias: Tensor | None = None
    rope: RopeTable | None = None
    front: int | None = None
    kwargs: dict[str, Any] | None = None
    groups: list[Any] | None = None
    attended: bool = True
    left: tuple[Site, TokenState, tuple[int, int]] | None = None
    entry: Entry | None = None

    def clear(self) -> None:
        """Let go of what a block has captured."""
        self.site = self.state = self.kwargs = self.groups = None
        self.queries = self.keys = self.inputs = self.values = self.before = None
        self.bias = self.rope = self.front = None
        self.attended = True

    def start(self, entry: Entry) -> None:
        """An entry point is called; one of the same patch that is still there was interrupted."""
        if entry.owner is not None and self.entry is not None and self.entry.owner is entry.owner:
            self.end()
        entry.outer = self.entry, self.left
        self.entry, self.left = entry, None

    def end(self) -> None:
        """Let go of everything: the entry point has returned, or was left by an exception in the middle of a block. An
        outer one goes on."""
        self.clear()
        self.entry, self.left = (None, None) if self.entry is None else self.entry.outer


class _OfThread(threading.local):
    """One Flow for each thread, made once and changed in place: torch.compile loses what a compiled block sets anew in
    thread-local storage."""

    def __init__(self) -> None:
        self.flow = Flow()


_THREAD = _OfThread()


def flow() -> Flow:
    """The Flow of this thread."""
    return _THREAD.flow


Function = TypeVar("Function", bound=Callable[..., Any])
_ATTRIBUTE = "_tokenprune_state"


def remember(x: Tensor, state: Any) -> None:
    """Tie `state` to the hidden tensor x."""
    setattr(_holder(x), _ATTRIBUTE, state)


def recall(x: Tensor) -> Any:
    """The state tied to the hidden tensor x, or None."""
    return getattr(_holder(x), _ATTRIBUTE, None)


def _holder(x: Tensor) -> Any:
    return x if torch.compiler.is_compiling() or is_wrapped(x) else x.untyped_storage()


def times_written(x: Tensor) -> int | None:
    """How often x was changed in place, None where torch does not count."""
    return None if torch.compiler.is_compiling() or is_wrapped(x) or x.is_inference() else x._version


def in_backward() -> bool:
    """Whether a block runs because gradient checkpointing runs it once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def constant_in_graphs(function: Function) -> Function:
    """Call `function` while torch.compile traces, and build its result into the graph: its arguments are constants
    that the graph is guarded by (torch.compiler.assume_constant_result, without its import of the compiler)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
