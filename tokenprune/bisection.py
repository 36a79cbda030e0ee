"""Bisection: the setting at which what is really counted is nearest to what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def nearest_to(
    aim: float,
    tried: Callable[[float], tuple[float, Found]],
    low: float,
    high: float,
    *,
    first: float,
    rising: bool,
    near: float,
    rounds: int,
) -> tuple[float, Found]:
    """(share of the multiply-adds, what came with it) of the setting between `low` and `high`, from `first` on, that
    came nearest to `aim`, of equals the first.

    tried: a setting -> the two. rising: whether a larger setting costs more. near: an error at which it is enough.
    rounds: most settings that are tried, one at least.
    """
    setting = first
    best = tried(setting)
    last = best
    for _ in range(rounds - 1):
        if abs(last[0] - aim) <= near:
            break
        low, high = (setting, high) if (last[0] < aim) == rising else (low, setting)
        setting = (low + high) / 2
        last = tried(setting)
        best = min(best, last, key=lambda one: abs(one[0] - aim))
    return best
