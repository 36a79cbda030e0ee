"""Site: the hooks on one block, the only code that runs inside a user's forward.

A site is a plain object whose bound methods are native hooks, so that a patched model pickles, deep-copies, compiles
and leaves nothing behind. It knows no library (its facts come from the adapter) and no method.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.costs import pad_tokens
from tokenprune.errors import UnsupportedMethod, UnsupportedModel
from tokenprune.host import BlockHost
from tokenprune.masking import mask_tokens, stand_ins
from tokenprune.ragged_blocks import reduce_ragged, restore_packed, unpack_for_head
from tokenprune.recording import PlaceRecord
from tokenprune.reduction import Reduction
from tokenprune.reindexing import reindexed
from tokenprune.restore import follow_source, restore_tokens, undo
from tokenprune.state import Entry, TokenState, flow, in_backward, recall, remember, times_written
from tokenprune.taps import Taps

if TYPE_CHECKING:
    from tokenprune.learning import Lesson
    from tokenprune.patch import Patch
    from tokenprune.ragged import Pack


class Site:
    """Hooks of block `index` of a patched model; `reduces` says whether tokens are reduced here."""

    def __init__(self, patch: Patch, index: int, facts: BlockHost, *, reduces: bool, mid: bool) -> None:
        self.patch = patch
        self.index = index
        self.name = facts.name
        self.reduces = reduces
        self.mid = mid
        self.front = patch.method.position == "front"
        self.taps = Taps(patch, index, facts)
        self.arguments = facts.arguments
        self.key_bias = facts.key_bias
        self.bias_arguments = facts.bias_arguments
        self.rope_argument = facts.rope_argument
        self.mask_argument = facts.mask_argument
        self.rope_identity = facts.rope_identity
        self.intercepts = facts.intercepts

    def attach(self, facts: BlockHost) -> None:
        """Put the hooks on the block: innermost, so that the user's own hooks see the reduced tokens."""
        block = facts.module
        block.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        if self.reduces:
            if not self.front:
                self.taps.attach(facts)
            if not self.mid and not self.front:
                block.register_forward_hook(self.reduce_output, prepend=True)
        block.register_forward_hook(self.leave)
        if facts.records is not None:
            _move_behind(block._forward_hooks, facts.records)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the block: find the tokens that are left and re-index what else is indexed by token."""
        x = args[0] if args else next(iter(kwargs.values()))
        now = flow()
        now.clear()
        now.site = self
        if not self.patch.active:
            return None
        if not torch.compiler.is_compiling():
            self.taps.follow(module)
        if not isinstance(x, Tensor):
            raise UnsupportedModel(
                "a symbolic trace of a patched model cannot choose tokens; trace the unpatched model, or use"
                " torch.compile or torch.export"
            )
        if self.patch.method.training_only and self._rests(module, x):
            return None
        if len(args) > 1 and self.arguments:
            args, kwargs = args[:1], {**dict(zip(self.arguments, args[1:], strict=False)), **kwargs}
        if kwargs.get("is_causal") or (self.mask_argument and kwargs.get(self.mask_argument) is not None):
            raise UnsupportedModel(
                "tokens cannot be reduced under an attention mask (the caller's own, a causal one, or that of padded"
                " patches); call the model with images of one size and no mask, or unpatch it first"
            )
        state = self._incoming(x)
        now.state = state
        now.front = state.front if self.index == self.patch.depth - 1 else None
        self.patch.mark(self, "enter")
        if state.reduced is not None:
            if x.requires_grad and not state.reduced.requires_grad:
                raise UnsupportedModel(
                    "restored intermediate features cannot be differentiated through re-entrant checkpointing; use"
                    " use_reentrant=False"
                )
            args, kwargs = _with_hidden(state.reduced, args, kwargs)
            now.state = state = replace(state, reduced=None)
            if torch.is_grad_enabled():
                remember(args[0] if args else next(iter(kwargs.values())), state)  # as in `_incoming`
        elif self.patch.probe is not None and self.index == 0:
            first, now.state = self._first_tokens(x, state, self.patch.probe.tokens)
            state = now.state
            args, kwargs = _with_hidden(first, args, kwargs)
        if state.undo and self.patch.fuses and self.index == self.patch.depth - 1:
            full, state = self._all_tokens(args[0] if args else next(iter(kwargs.values())), state)
            args, kwargs, now.state = *_with_hidden(full, args, kwargs), state
        if self.reduces and self.front:
            args, kwargs = _with_hidden(self.reduce(args[0] if args else next(iter(kwargs.values()))), args, kwargs)
            state = now.state
        if state.pack is not None:  # re-indexed where the attention is called
            now.kwargs, now.attended = kwargs, False
            return args, kwargs
        if self.reduces and "block_input" in self.patch.method.needs:
            now.before = args[0] if args else next(iter(kwargs.values()))
        return args, self._reindexed(kwargs, state, x.dtype)

    def _rests(self, module: nn.Module, x: Tensor) -> bool:
        """Whether this block, of a method that acts in training alone, is in eval mode, and nothing was dropped in
        front of an earlier one."""
        if module.training:
            return False
        known = recall(x) if self.index or in_backward() else None
        return known is None or known.origin is None

    def _first_tokens(self, x: Tensor, state: TokenState, count: int) -> tuple[Tensor, TokenState]:
        """The first `count` of the prunable tokens of x, which alone are counted."""
        origin = torch.arange(count, device=x.device).expand(x.shape[0], -1)
        return x[:, : self.patch.num_prefix_tokens + count], replace(state, tokens=count, origin=origin)

    def _reindexed(self, kwargs: dict[str, Any], state: TokenState, dtype: torch.dtype) -> dict[str, Any]:
        return reindexed(self, kwargs, state, dtype)

    def resume(self, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Take up again the block that `enter` has given x and the arguments `kwargs`, to run it once more."""
        now = flow()
        now.clear()
        now.site, now.state = self, recall(x)
        if now.state is None:
            raise UnsupportedModel(
                f"gradient checkpointing runs {self.name} once more on a copy of its input, for which no tokens are"
                " known; leave its saved tensors where they are"
            )
        if now.state.pack is not None:
            now.kwargs, now.attended = kwargs, False
            return
        if self.reduces and "block_input" in self.patch.method.needs:
            now.before = x
        now.rope = kwargs.get(self.rope_argument) if self.rope_argument else None
        biases = (kwargs.get(name) for name in {self.key_bias, *self.bias_arguments} if name is not None)
        now.bias = next((bias for bias in biases if bias is not None), None)

    def _incoming(self, x: Tensor) -> TokenState:
        now = flow()
        state = recall(x) if self.index or in_backward() else None
        if state is not None and state.reduced is not None and state.version != times_written(x) and not in_backward():
            state = None  # a hook of the user's wrote into the restored grid, which goes on as it is
        if state is None and self.index and now.left is not None:
            site, left, shape = now.left
            # A hook of the user's replaced the tensor between two blocks.
            if site.patch is self.patch and site.index == self.index - 1 and shape == x.shape[:2]:
                state = left
        if state is None:
            state = self._entered(x, now.entry)
            if torch.is_grad_enabled() or x.requires_grad:
                remember(x, state)  # found again when checkpointing re-runs the first block
        return state

    def _entered(self, x: Tensor, entry: Entry | None) -> TokenState:
        """Of x in front of the first block, or behind a tensor that nothing is known of."""
        tokens = x.shape[1] - self.patch.num_prefix_tokens
        dense = entry.dense if entry is not None else ()
        grid = entry.grid if entry is not None else self.patch.grid
        if grid is not None and grid[0] * grid[1] != tokens:  # some were dropped before the first block
            grid = None
        forward = None
        if self.index == 0:
            self.patch.entered = tokens
            forward = self.patch.new_forward(grid)
        last = entry.last if entry is not None and entry.last is not None else self.patch.depth - 1
        if entry is None and self.patch.method.adaptive:  # a loop of the user's own over the blocks
            dense = (last,)
        front = entry.front if entry is not None else None
        return TokenState(tokens, tokens, grid=grid, forward=forward, dense=dense, last=last, front=front)

    def _all_tokens(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """All tokens [B, P + entering, C] behind those that are left, x [B, P + n, C], and their state."""
        if torch.is_grad_enabled() and x.requires_grad and not state.recorded:
            raise UnsupportedModel(
                f"the tokens that come back in front of {self.name} left where no gradient was recorded, and it would"
                " be wrong; under gradient checkpointing use use_reentrant=False"
            )
        if state.pack is None:
            full = restore_tokens(x, state, self.patch.num_prefix_tokens)
        else:
            full = restore_packed(x, state, state.pack)
            self.patch.seen = state.counts if state.pack.images else self.patch.seen
        state = replace(state, tokens=state.entering, origin=None, sizes=None, source=None, undo=(), pack=None)
        if torch.is_grad_enabled():
            remember(full, state)  # as in `_incoming`
        return full, state

    def reduce_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the block, where it cannot be done between attention and MLP."""
        return self.reduce(output)

    def reduce(self, x: Tensor) -> Tensor:
        """Score, select and reduce the tokens of x [B, P + n, C], and note what went where."""
        state = flow().state
        if not self.reduces or state is None or flow().front is not None:  # nobody would see which tokens leave
            return x
        if self.patch.lesson is not None and self.patch.method.mask is not None:
            return mask_tokens(self, x, state)
        if self.patch.lesson is not None:
            x = self._taught(x, state, self.patch.lesson)
        keep = self.patch.leaving(self.index, state)
        if keep is None:
            return x
        self.patch.mark(self, "score")
        if self.patch.method.adaptive:
            return reduce_ragged(self, x, state, keep)
        captured = (None, None, None) if self.front else None  # nothing of the block has run
        leaving, flow().state = self._reduced(x, state, keep, captured)
        return leaving

    def _taught(self, x: Tensor, state: TokenState, lesson: Lesson) -> Tensor:
        """Note the tokens that enter a place of a training forward, and disturb them."""
        if not in_backward():  # where gradient checkpointing runs the block once more
            lesson.entered[self.index] = x.detach()
        learned = self.patch.method.learned
        assert learned is not None
        return x if learned.disturb is None else learned.disturb(self.taps.record(x, state))

    def _reduced(self, x: Tensor, state: TokenState, keep: int, captured: Any = None) -> tuple[Tensor, TokenState]:
        """The `keep` tokens that leave of x [B, P + n, C], and their state; `captured` as in `Taps.record`."""
        with nullcontext() if self.patch.lesson is not None else torch.no_grad():
            record = self.taps.record(x, state, captured)
            reduction = self.patch.method.reduce(record, keep)
        if self.front and in_backward() and state.drawn is not None:
            reduction = state.drawn  # it was drawn anew only so that what the block draws itself comes out as it did
        elif self.front:
            remember(x, replace(state, drawn=reduction))
        if reduction.tokens != keep:
            raise UnsupportedMethod(
                f"{self.patch.method.name} left {reduction.tokens} tokens at {self.name} where {keep} were to be left"
            )
        prefix = self.patch.num_prefix_tokens
        leaving, sizes = _leaving(x, state.sizes, reduction, prefix, self.patch.method.merges)
        origin = reduction.follow(state.origin)
        if (state.dense or self.patch.fuses) and self.patch.probe is None:
            back = undo(self.patch.method.restoration, state, reduction, x[:, prefix:], leaving[:, prefix:])
            state = state.undone_by(back)
        if state.forward is not None and not in_backward():
            source = follow_source(state, reduction.source(state.tokens))
            state = replace(state, source=source)
            own = None if sizes is None else sizes[:, prefix:]
            state.forward.places.append(PlaceRecord(self.name, origin, source, own))  # type: ignore[union-attr]
        if self.patch.probe is not None:  # counted, not removed
            self.patch.mark(self, "reduced")
            return x, state
        return leaving, replace(state, tokens=keep, origin=origin, sizes=sizes, reduced=None, drawn=None)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After the block: hand the state to the next one, and restore the full grid where it is read here."""
        now = flow()
        state, site, attended = now.state, now.site, now.attended
        now.clear()
        if site is not self and self.patch.active:
            raise UnsupportedModel(
                f"another patched model, or another block of this one, ran inside {self.name} (a hook on one of its"
                " parts?), and the tokens of this forward are lost; run that one outside, or unpatch it"
            )
        if state is None or not isinstance(output, Tensor):
            return None
        if not attended:
            raise UnsupportedModel(
                f"the attention of {self.name} was replaced after the patch and mixed the tokens of different images;"
                " patch the model again"
            )
        self.patch.mark(self, "leave")
        last = self.index == self.patch.depth - 1
        now.left = None if last else (self, state, (output.shape[0], output.shape[1]))
        if state.pack is not None:
            return self._leave_packed(output, state, state.pack)
        full = self._full(output, state, last=last)
        if full is not None and not last:
            remember(full, replace(state, reduced=output, version=times_written(full)))
        elif not last:
            remember(output, state)
        return full

    def _full(self, output: Tensor, state: TokenState, *, last: bool) -> Tensor | None:
        """The block's output on the full grid, where that is read behind it and not all tokens are there."""
        if last and self.patch.probe is not None and state.dense:
            return pad_tokens(output, self.patch.num_prefix_tokens + state.entering)
        if state.alive is not None and self.index in state.dense:
            return stand_ins(output, state, self.patch.num_prefix_tokens)
        if state.undo and (self.index in state.dense or (last and -1 in state.dense and state.sizes is not None)):
            return restore_tokens(output, state, self.patch.num_prefix_tokens)
        return None

    def _leave_packed(self, output: Tensor, state: TokenState, pack: Pack) -> Tensor | None:
        last = self.index == state.last
        if last and pack.images:
            self.patch.seen = state.counts
        merged_tail = last and -1 in state.dense and pack.sizes is not None
        if self.index in state.dense or merged_tail:
            full = restore_packed(output, state, pack)
            if not last:
                remember(full, replace(state, reduced=output, version=times_written(full)))
            return full
        if last:
            return unpack_for_head(output, pack)
        remember(output, state)
        return None


def _move_behind(hooks: dict[int, Any], records: Callable[[Any], bool]) -> None:
    """Move the host's recording hooks, and what runs behind them, behind the hook that was registered last."""
    keys = list(hooks)
    first = next((i for i, key in enumerate(keys) if records(hooks[key])), len(keys))
    for key in keys[first:-1]:
        hooks[key] = hooks.pop(key)


def _leaving(
    x: Tensor, sizes: Tensor | None, reduction: Reduction, prefix: int, merges: bool
) -> tuple[Tensor, Tensor | None]:
    """The tokens of x [B, P + n, C] that leave, [B, P + K, C], and where `merges` the original patches in each."""
    if reduction.mixes:
        leaving = reduction(x[:, prefix:])
        leaving = torch.cat([x[:, :prefix], leaving], 1) if prefix else _in_layout_of(x, leaving)
    else:  # the whole sequence, as a slice of it would be copied to be gathered
        whole = reduction.with_prefix(prefix)
        if merges and whole.averages_by_size:
            leaving, sizes = whole.with_sizes(x, sizes)
            return leaving if prefix else _in_layout_of(x, leaving), sizes
        leaving = whole(x, sizes) if prefix else _in_layout_of(x, whole(x, sizes))
    if not merges:
        return leaving, sizes
    if sizes is None:
        sizes = x.new_ones(x.shape[:2], dtype=torch.float32)
    return leaving, torch.cat([sizes[:, :prefix], reduction.merged_sizes(sizes[:, prefix:])], 1)


def _in_layout_of(x: Tensor, leaving: Tensor) -> Tensor:
    """`leaving` stored by channel where x is (a patch embedding's transposed output, which no prefix was put in front
    of): a later sum over tokens runs in memory order, and its last bits would differ."""
    return leaving.transpose(1, 2).contiguous().transpose(1, 2) if x.stride(-1) != 1 else leaving


def _with_hidden(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): x}
