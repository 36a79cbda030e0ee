"""OverSteps: what a method takes from earlier steps of a denoising run instead of computing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod

_ROUNDING = 1e-6
"""A share of steps may fall so far short of the number that it is written for."""


@dataclass(frozen=True)
class Level:
    """One stack at one step. tokens: N that enter it. grid: (rows, columns) of them, None where the latents have none.
    share: of the tokens to compute, by the budget and the steps' schedule. position: of the step, in [0, 1) of the run.
    place: number of the stack, of `places`."""

    tokens: int
    grid: tuple[int, int] | None
    share: float
    position: float
    place: int
    places: int


@dataclass(frozen=True)
class Memory:
    """What a run remembers of a stack when its tokens are scored.

    predictions: of the last step, one for each call of it (guidance in two calls has two), [B, C, H, W] or [B, N, C].
    channels: how many of the first channels of a prediction [B, C, H, W] are the latents'. dropped: [B, N] steps at
    which a token was not computed. stale: [B, N] steps since it was, 0 for one computed at the last step. observed:
    [B, N] what `observe` gave at the last dense step, None without it.
    """

    predictions: tuple[Tensor, ...]
    channels: int
    dropped: Tensor
    stale: Tensor
    observed: Tensor | None


@dataclass(frozen=True)
class OverSteps:
    """How a method computes a part of the tokens at a step and takes the others from an earlier one.

    reuses: "tokens": a token that is not computed is out of all blocks; its keys and values stay those of the last step
    at which it was, and so does its prediction. "mlp": the attention's output is the last dense step's for all tokens,
    the MLP's of the tokens that are not computed is an earlier one. dense: (step, steps) -> whether all is computed at
    that step of a run of `steps` (0 is the first, which always is; a run whose scheduler is not known is taken to have
    `denoisers.run.UNKNOWN_STEPS`). score: (record, memory) -> importance [B, N]. count: how many tokens a stack
    computes where the method's own rule says it; None: the share of the budget. fixed: whether it is the same tokens at
    every step. observe: (record of a block's attention with queries and keys) -> [B, N], at dense steps. lacks: what
    must be given before it can be used, as an error says it.
    """

    reuses: Literal["tokens", "mlp"]
    dense: Callable[[int, int], bool]
    score: Callable[[AttentionRecord, Memory], Tensor]
    count: Callable[[Level], int] | None = None
    fixed: bool = False
    observe: Callable[[AttentionRecord], Tensor] | None = None
    lacks: str | None = None


def at_steps(named: Sequence[float]) -> Callable[[int, int], bool]:
    """`OverSteps.dense` for steps that are named by their numbers in a run, or by shares of it below 1: 0.1 is number 5
    of 50 and number 2 of 28.

    Raises:
        UnsupportedMethod: they are neither.
    """
    try:
        steps = list[Any](named)
    except TypeError:  # no row, or an array without dimensions, which says so only here
        steps = [None]
    if not all(isinstance(n, Real) and not isinstance(n, bool) and (_whole(n) or 0 <= float(n) < 1) for n in steps):
        raise UnsupportedMethod(
            f"dense_steps are whole numbers of at least 0, or shares of the run below 1, got {named!r}; for example"
            " dense_steps=(0, 1) or (0, 0.1)"
        )
    return partial(_among, numbers=frozenset(filter(_whole, steps)), shares=[n for n in steps if not _whole(n)])


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and int(number) >= 0


def _among(step: int, steps: int, numbers: frozenset[Any], shares: Sequence[float]) -> bool:
    return step in numbers or any(step == int(share * steps + _ROUNDING) for share in shares)
