"""The table method x family: each method is put on a tiny model of each family, and a refusal says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

import tokenprune
from tokenprune.errors import BudgetError, TokenPruneError, UntrainedMethod
from tokenprune.evals.family_models import IMAGE_FAMILIES, OTHER_FAMILIES, Family, Made
from tokenprune.method_families import MethodTable
from tokenprune.registry import make_method

# What the first place is called in the report of a vision-language model.
_PARTS = {"after the tower": "behind the image tower", "layers": "between layers of the language model"}
_WITHOUT_BIAS = "proportional=False"
# What a method cannot do without, whatever the family.
_GIVEN: dict[str, dict[str, Any]] = {"region": {"mask": torch.ones(8, 8).triu()}}


def method_table(families: Iterable[Family] = (*IMAGE_FAMILIES, *OTHER_FAMILIES)) -> MethodTable:
    """The table of all methods, computed now.

    Raises:
        ImportError: a family's library is not there.
    """
    cells: dict[str, dict[str, str]] = {info.name: {} for info in tokenprune.methods()}
    adapters: dict[str, str] = {}
    for family in families:
        made = family.make()
        shape = made[2]().shape
        for name, row in cells.items():
            row[family.name], adapter = _tried(name, family.part, made, shape)
            adapters[family.name] = adapter or adapters.get(family.name, "")
    return MethodTable(cells, adapters)


def to_markdown(table: MethodTable) -> str:
    """A table of the methods for image towers, one of all methods on the other families, and the reasons."""
    images = [family.name for family in IMAGE_FAMILIES if family.name in table.adapters]
    others = [family.name for family in OTHER_FAMILIES if family.name in table.adapters]
    vision = [method for method, row in table.cells.items() if any(not row[family] for family in images)]
    reasons: dict[str, int] = {}
    parts = [_grid(table.cells, vision, images, reasons), _grid(table.cells, list(table.cells), others, reasons)]
    return "\n\n".join([*filter(None, parts), "\n".join(f"{number}. {why}" for why, number in reasons.items())]) + "\n"


def _tried(name: str, part: str, made: Made, shape: torch.Size) -> tuple[str, str]:
    """Why the method does not work there, empty where it does, or would with what it has to learn first; and the
    adapter that it runs by."""
    model, target, run = made
    given = _GIVEN.get(name, {})
    model.train(make_method(name, given).training_only)
    try:
        try:
            tokenprune.patch(target, name, keep=0.5, **given)
        except BudgetError:
            tokenprune.patch(target, name, **given)
        output = run()
        data = tokenprune.report(target).to_dict()
    except UntrainedMethod:
        return "", ""
    except TokenPruneError as error:
        why = str(error).split(";")[0].removeprefix(f"{name} ")
        return why + (f" ({_WITHOUT_BIAS} works)" if _WITHOUT_BIAS in str(error) else ""), ""
    finally:
        tokenprune.unpatch(target)
        model.eval()
    if output.shape != shape or not output.isfinite().all():
        return f"gives {tuple(output.shape)}, or what is not finite", ""
    place = data["places"][0]["name"]
    where = next((told for start, told in _PARTS.items() if place.startswith(start)), place)
    return ("" if place.startswith(part) else f"works {where}"), data["family"]


def _grid(
    cells: Mapping[str, Mapping[str, str]], methods: list[str], families: list[str], reasons: dict[str, int]
) -> str:
    if not families or not methods:
        return ""
    lines = ["| method | " + " | ".join(families) + " |", "| --- |" + " :-: |" * len(families)]
    for method in methods:
        whys = [cells[method][family] for family in families]
        row = [f"({reasons.setdefault(why, len(reasons) + 1)})" if why else "●" for why in whys]
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return "\n".join(lines)
