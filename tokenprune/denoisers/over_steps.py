"""OverSteps: what a method takes from earlier steps of a denoising run instead of computing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from torch import Tensor

from tokenprune.attention_record import AttentionRecord
from tokenprune.errors import UnsupportedMethod


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
    the MLP's of the tokens that are not computed is an earlier one. dense: whether all is computed at a step (0 is the
    first of a run, which always is). score: (record, memory) -> importance [B, N]. count: how many tokens a stack
    computes where the method's own rule says it; None: the share of the budget. fixed: whether it is the same tokens at
    every step. observe: (record of a block's attention with queries and keys) -> [B, N], at dense steps. lacks: what
    must be given before it can be used, as an error says it.
    """

    reuses: Literal["tokens", "mlp"]
    dense: Callable[[int], bool]
    score: Callable[[AttentionRecord, Memory], Tensor]
    count: Callable[[Level], int] | None = None
    fixed: bool = False
    observe: Callable[[AttentionRecord], Tensor] | None = None
    lacks: str | None = None


def at_steps(numbers: Sequence[int]) -> Callable[[int], bool]:
    """`OverSteps.dense` for steps that are named by their numbers in a run.

    Raises:
        UnsupportedMethod: they are no whole numbers of at least 0.
    """
    steps = list(numbers) if isinstance(numbers, Iterable) else [None]
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in steps):
        raise UnsupportedMethod(
            f"dense_steps are whole numbers of at least 0, got {numbers!r}; for example dense_steps=(0, 1)"
        )
    return frozenset(steps).__contains__
