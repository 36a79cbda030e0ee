"""How much of the computation a patch may keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tokenprune.errors import BudgetError

Kind = Literal["default", "keep", "flops", "tokens", "schedule"]


@dataclass(frozen=True)
class Budget:
    """One budget of a patch.

    kind "keep": share in (0, 1] of the prunable tokens that leave the last place; "flops": share in (0, 1] of the
    unpatched multiply-adds, scoring counted; "tokens": prunable tokens leaving the last place; "schedule": place ->
    share in (0, 1] of the tokens entering that place which leave it; "default": the method's published setting.
    """

    kind: Kind = "default"
    value: float = 1.0
    shares: tuple[tuple[str, float], ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether the budget asks for nothing to be left out (1.0 as keep or flops)."""
        return self.kind in ("keep", "flops") and self.value == 1.0

    def __str__(self) -> str:
        if self.kind == "default":
            return "the method's published default"
        if self.kind == "schedule":
            return "schedule={" + ", ".join(f"{place}: {share:g}" for place, share in self.shares) + "}"
        return f"{self.kind}={self.value:g}"


def parse_budget(
    *,
    keep: float | None = None,
    flops: float | None = None,
    tokens: int | None = None,
    schedule: Mapping[int | str, float] | None = None,
) -> Budget:
    """The one budget that was given, or the default.

    Raises:
        BudgetError: more than one budget, or a value outside its range.
    """
    given = {"keep": keep, "flops": flops, "tokens": tokens, "schedule": schedule}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise BudgetError(f"one budget at most, got {' and '.join(named)}; for example patch(model, {named[0]}=0.6)")
    if keep is not None:
        return Budget("keep", _share("keep", keep))
    if flops is not None:
        return Budget("flops", _share("flops", flops))
    if tokens is not None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise BudgetError(f"tokens must be a whole number of at least 1, got {tokens!r}; for example tokens=64")
        return Budget("tokens", tokens)
    if schedule is not None:
        if not isinstance(schedule, Mapping) or not schedule:
            raise BudgetError(f"schedule must map blocks to shares, got {schedule!r}; for example {{3: 0.7, 6: 0.7}}")
        return Budget(
            "schedule", shares=tuple((str(place), _share(f"schedule[{place!r}]", s)) for place, s in schedule.items())
        )
    return Budget()


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise BudgetError(f"{name} must be a share in (0, 1], got {value!r}; for example {name.split('[')[0]}=0.6")
    return float(value)
