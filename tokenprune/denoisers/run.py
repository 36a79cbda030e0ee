"""Where in its run a forward is: told by its timestep, so that no counter can go out of step.

A run is a row of forwards that go forward in the scheduler's list of timesteps, in which one may stand twice (Heun),
and where no scheduler is known, a row of falling timesteps. What belongs to it (which tokens its last step computes) is
kept by thread and patch; it is dropped when the timestep changes, and a new run begins when the scheduler's timesteps
are set anew, when a forward goes back in them, or, where no scheduler is known, when the latents' kind changes:
img2img's partial runs, repeated and interrupted calls, a scheduler of any kind and another pipeline on the same model
need nothing else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenprune.recording import Forward
from tokenprune.reduction import Reduction, Rows
from tokenprune.tables import positions

UNKNOWN_STEPS = 50
"""Steps that a run is taken to have where no scheduler says it."""


class Chosen:
    """What a stack computes, made ready for all of its blocks.

    near: [B, N] which of the computed tokens each token is most like, None where dropped ones keep their value. tokens:
    N that enter the stack.
    """

    def __init__(self, reduction: Reduction, near: Tensor | None, tokens: int) -> None:
        self.reduction = reduction
        self.near = None if near is None else Rows(near, reduction.tokens)
        self.tokens = tokens

    @cached_property
    def rows(self) -> Rows | None:
        """The computed tokens where they are an index."""
        return Rows(self.reduction.kept, self.tokens) if self.reduction.is_index else None

    @cached_property
    def index(self) -> Tensor:
        """[B, K] positions of the computed tokens."""
        kept = self.reduction.kept
        if self.reduction.is_index:
            return kept
        return self.reduction.follow(positions(self.tokens, kept).expand(kept.shape[0], -1))

    def take(self, x: Tensor) -> Tensor:
        """x [B, N, C] to what is computed of it, [B, K, C]."""
        return self.reduction(x) if self.rows is None else self.rows.take(x)

    def bring_back(self, reduced: Tensor, entered: Tensor, full: Tensor) -> Tensor:
        """See `Reduction.bring_back`."""
        return self.reduction.bring_back(reduced, entered, full) if self.rows is None else self.rows.put(full, reduced)


@dataclass(eq=False)
class Run:
    """One run of one patch in this thread.

    timestep: of the last forward. shape: of the latents. positions: of the steps that the run has left at its
    beginning, in [0, 1) of the whole. guidance: `copies`, None before it is asked for. sets: what
    each stack computed at this step, for the second call of a guided step. shared: see `AttentionRecord.once`, of this
    step. index: of the step, counted from 0. call: of the step's calls. held: what a method chose for some steps, by
    stack and call. kept: what a method takes from earlier steps. kind: dtype and device of the latents. whole: the
    scheduler's timesteps, a list of its own for each time that they are set. place: of this step in it, None where it
    is not known. position: of this step. channels: see `DenoiserHost`.
    """

    timestep: float
    shape: tuple[int, ...]
    positions: tuple[float, ...]
    guidance: int | None
    latents: weakref.ref[Tensor] | None = None
    version: int = 0
    sets: dict[str, Chosen] = field(default_factory=dict)
    index: int = 0
    call: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    held: dict[tuple[str, int], Reduction] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)
    kind: tuple[torch.dtype, torch.device] | None = None
    whole: Sequence[float] | None = None
    place: int | None = None
    position: float = 0.0
    channels: int | None = None

    @property
    def copies(self) -> int:
        """How many times the latents stand in the batch at this step; counted where it is asked for."""
        if self.guidance is None:
            latents = self.latents() if self.latents is not None else None
            self.guidance = 1 if latents is None else guidance_copies(latents[:, : self.channels])
        return self.guidance


@dataclass(eq=False)
class Pass:
    """One forward of the denoiser. keep: {stack: how many tokens it computes}, those left whole are not in it. sets:
    {stack: the tokens}, blocks: {block: the tokens} of those that compute fewer. grid: (rows, columns) of the latents.
    step: see AttentionRecord. due: what a method that holds a choice over steps is to do at this one. tokens: {stack:
    how many enter it}. forward: the recording of it, where one is wanted."""

    patch: Any
    run: Run
    keep: dict[str, int]
    grid: tuple[int, int] | None
    reuse: bool
    step: Tensor
    due: str = "select"
    tokens: Mapping[str, int] = field(default_factory=dict)
    forward: Forward | None = None
    sets: dict[str, Chosen] = field(default_factory=dict)
    blocks: dict[str, Chosen] = field(default_factory=dict)


class _OfThread(threading.local):
    """Changed in place and never rebound: torch.compile loses what a compiled block sets anew in a thread's storage."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.runs: dict[str, Run] = {}
        # The same run, once for each shape and kind of its latents, as each keeps its own.
        self.beside: dict[str, dict[Any, Run]] = {}


_THREAD = _OfThread()


def running() -> Pass | None:
    """The forward that this thread is in, or None."""
    return _THREAD.passes[-1] if _THREAD.passes else None


def start(one: Pass) -> None:
    """A forward begins."""
    _THREAD.passes.append(one)


def finish(patch: Any) -> None:
    """The forward of `patch` has ended, by a result or an exception anywhere in it."""
    passes = _THREAD.passes
    while passes and any(one.patch is patch for one in passes):
        passes.pop()


def run_of(
    key: str,
    latents: Tensor,
    timestep: float,
    whole: Sequence[float] | None,
    last: float,
    rounding: float = 0.0,
    channels: int | None = None,
) -> tuple[Run, bool]:
    """The run that a forward belongs to, and whether it is one more call of the last forward's step on the very same
    latents (guidance in two calls).

    whole: timesteps of the scheduler's whole run, where it is known, the same object for as long as they are not set
    anew. last: the timestep of pure noise. rounding: how far the timestep may be from the scheduler's.
    channels: see `DenoiserHost`.
    """
    beside = _THREAD.beside.setdefault(key, {})
    before = run = _THREAD.runs.get(key)
    shape, kind = tuple(latents.shape), (latents.dtype, latents.device)
    if before is not None and before.whole is not whole:
        before = run = None
    if run is not None and (run.shape, run.kind) != (shape, kind):
        run = beside.get((shape, kind))
    if run is not None and run.timestep == timestep and _same(run, latents):
        run.call += 1
        _THREAD.runs[key] = run
        return run, True
    place = _place(timestep, whole, rounding) if run is None else _next_place(run, timestep, rounding)
    if run is None or not _follows(run, timestep, place):
        place = _place(timestep, whole, rounding)
        run = Run(timestep, shape, _positions(timestep, whole, place, last), None, kind=kind, whole=whole)
        if before is not None and (before.shape, before.kind) != (shape, kind) and _goes_on(before, place):
            run.positions, run.index = before.positions, before.index + _later(before, place)
        else:
            beside.clear()
    else:
        assert before is not None
        run.index = before.index + _later(before, place)
    _THREAD.runs[key] = run
    beside[shape, kind] = run
    for of, other in list(beside.items()):
        if other is not run and not _goes_on_soon(other, place):
            del beside[of]
    run.timestep, run.sets, run.shared, run.call = timestep, {}, {}, 0
    run.place, run.position = place, _position(timestep, whole, place, last)
    run.guidance, run.channels = None, channels  # images that begin with the same noise are no copies later
    run.latents, run.version = weakref.ref(latents), _version(latents)
    return run, False


def _goes_on(run: Run, place: int | None) -> bool:
    """Whether a forward of latents of another kind, at this place of the scheduler's timesteps, is of the same run:
    where guidance ends, or a step has a second call on a part of the batch."""
    return run.place is not None and place is not None and place >= run.place


def _later(run: Run, place: int | None) -> int:
    """1 where a forward at this place is of a later step than the run's last one, 0 where it is of the same."""
    return int(place is None or run.place is None or place > run.place)


def _goes_on_soon(run: Run, place: int | None) -> bool:
    """Whether what a run keeps of latents of another kind than those at this place may be wanted yet."""
    return run.place is not None and place is not None and place - run.place <= 1


def fresh(key: str, latents: Tensor) -> Run:
    """A run of one forward alone, of a training, whose forwards are at steps that have nothing to do with another."""
    forget(key)
    run = _THREAD.runs[key] = Run(0.0, tuple(latents.shape), (0.0,), 1)
    return run


def last_run(key: str) -> Run | None:
    """The run of a patch's last forward in this thread."""
    return _THREAD.runs.get(key)


def forget(key: str) -> None:
    """Drop what is kept of a patch's run in this thread."""
    _THREAD.runs.pop(key, None)
    _THREAD.beside.pop(key, None)


def positions_from(timestep: float, whole: Sequence[float] | None, last: float) -> tuple[float, ...]:
    """Positions, in [0, 1) of the whole run, of the steps from `timestep` on: the share of the scheduler's steps before
    each, or without a scheduler the share of the noise that is gone."""
    return _positions(timestep, whole, _place(timestep, whole, 0.0), last)


def guidance_copies(latents: Tensor) -> int:
    """How many times the same latents stand in the batch one after the other: of a guided batch 2 or 3, of images from
    the same noise as many times more."""
    batch = latents.shape[0]
    if batch < 2 or latents.device.type == "meta" or torch.compiler.is_compiling():
        return 1
    like_first = (latents == latents[:1]).flatten(1).all(1).tolist()
    for images in range(1, batch // 2 + 1):
        if batch % images == 0 and all(like_first[::images]) and torch.equal(latents[images:], latents[:-images]):
            return batch // images
    return 1


def _positions(timestep: float, whole: Sequence[float] | None, place: int | None, last: float) -> tuple[float, ...]:
    if place is not None and whole is not None:
        return tuple(i / len(whole) for i in range(place, len(whole)))
    first = _position(timestep, None, None, last)
    return tuple(first + (1.0 - first) * i / UNKNOWN_STEPS for i in range(UNKNOWN_STEPS))


def _position(timestep: float, whole: Sequence[float] | None, place: int | None, last: float) -> float:
    if place is not None and whole is not None:
        return place / len(whole)
    return min(max(0.0, 1.0 - timestep / last), 1.0 - 1e-6)


def _place(timestep: float, whole: Sequence[float] | None, rounding: float) -> int | None:
    if not whole:
        return None
    place = min(range(len(whole)), key=lambda i: abs(whole[i] - timestep))
    near = max(1e-3 * max(map(abs, whole)), rounding)
    return place if abs(whole[place] - timestep) <= near else None


def _next_place(run: Run, timestep: float, rounding: float) -> int | None:
    """The place of a forward behind those of a run: the next one where the timestep is there, which may be the same as
    the last forward's, else the nearest."""
    if run.whole and run.place is not None and run.place + 1 < len(run.whole):
        near = max(1e-6 * max(map(abs, run.whole)), rounding)
        if abs(run.whole[run.place + 1] - timestep) <= near:
            return run.place + 1
    return _place(timestep, run.whole, rounding)


def _follows(run: Run, timestep: float, place: int | None) -> bool:
    if place is not None and run.place is not None:
        return place > run.place
    return timestep < run.timestep


def _same(run: Run, latents: Tensor) -> bool:
    return run.latents is not None and run.latents() is latents and run.version == _version(latents)


def _version(latents: Tensor) -> int:
    return 0 if latents.is_inference() else latents._version
