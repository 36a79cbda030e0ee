"""How much of the computation a patch may keep."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard

from tokenprune.errors import BudgetError

Kind = Literal["default", "own", "keep", "flops", "tokens", "schedule"]

BUDGETS = ("keep", "flops", "tokens", "schedule")
"""The keywords of `patch` that are a budget with every method."""

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Budget:
    """One budget of a patch.

    kind "keep": share in (0, 1] of the prunable tokens that leave the last place; "flops": share in (0, 1] of the
    unpatched multiply-adds, scoring counted; "tokens": prunable tokens leaving the last place; "schedule": place ->
    share in (0, 1] of the tokens entering that place which leave it; "own": the method's own option of that name (an r
    of tokens per block, a rate per place), which its schedule follows; "default": the method's published setting.
    """

    kind: Kind = "default"
    value: float = 1.0
    shares: tuple[tuple[str, float], ...] = ()
    option: str = ""

    @property
    def is_full(self) -> bool:
        """Whether the budget asks for nothing to be left out (1.0 as keep or flops)."""
        return self.kind in ("keep", "flops") and self.value == 1.0

    def __str__(self) -> str:
        if self.kind == "default":
            return "the method's published default"
        if self.kind == "schedule":
            return "schedule={" + ", ".join(f"{place}: {share:g}" for place, share in self.shares) + "}"
        told = f"{self.value:g}" if isinstance(self.value, (int, float)) else str(self.value)
        return f"{self.option or self.kind}={told}"


def parse_budget(
    *,
    keep: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    schedule: Mapping[int | str, float] | None = None,
    own: tuple[str, float | None] | None = None,
) -> Budget:
    """The one budget that was given, or the default.

    own: name and value of the method's own option that is a budget; its schedule checks the value.

    Raises:
        BudgetError: more than one budget, or a value outside its range.
    """
    given = {"keep": keep, "flops": flops, "tokens": tokens, "schedule": schedule} | dict([own] if own else [])
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        both = [f"{name}={given[name]!r}" for name in named]
        raise BudgetError(f"one budget at most, got {' and '.join(both)}; for example patch(model, ..., {both[0]})")
    if keep is not None:
        return Budget("keep", checked_share("keep", keep))
    if flops is not None:
        return Budget("flops", checked_share("flops", flops))
    if tokens is not None:
        return Budget("tokens", checked_count("tokens", tokens, smallest=1, example=64))
    if schedule is not None:
        if not isinstance(schedule, Mapping) or not schedule:
            raise BudgetError(f"schedule must map blocks to shares, got {schedule!r}; for example {{3: 0.7, 6: 0.7}}")
        return Budget(
            "schedule",
            shares=tuple((str(place), checked_share(f"schedule[{place!r}]", s)) for place, s in schedule.items()),
        )
    if own is not None and own[1] is not None:
        return Budget("own", own[1], option=own[0])
    return Budget()


def checked_share(name: str, value: object) -> float:
    """`value` as a share in (0, 1].

    Raises:
        BudgetError: it is none.
    """
    if not is_number(value) or not 0.0 < value <= 1.0:
        example = "schedule={3: 0.6}" if name.startswith("schedule") else f"{name}=0.6"
        raise BudgetError(f"{name} must be a share in (0, 1], got {value!r}; for example {example}")
    return float(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a number that a float can hold, and not True or False."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    real: Any = value
    # Compared, not converted: of an integer beyond the floats both float() and math.isfinite raise.
    return bool(-LARGEST <= real <= LARGEST)


def checked_count(name: str, value: object, *, smallest: int, example: int, largest: int | None = None) -> int:
    """`value` as a whole number of at least `smallest`, and of at most `largest` where there is one.

    Raises:
        BudgetError: it is none.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < smallest or (largest is not None and value > largest):  # type: ignore[operator]
        bounds = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        raise BudgetError(f"{name} must be a whole number {bounds}, got {value!r}; for example {name}={example}")
    return int(value)  # type: ignore[call-overload,no-any-return]
