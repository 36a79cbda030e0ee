"""On which families each method works, as it was found by putting every method on a model of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

FILE = "method_families.json"


@dataclass(frozen=True)
class MethodTable:
    """cells: {method: {family: why it does not work there, empty where it does}}. adapters: {family: the name of its
    adapter}."""

    cells: Mapping[str, Mapping[str, str]]
    adapters: Mapping[str, str]

    def works(self, family: str) -> list[str]:
        """The methods that work on a family."""
        return [method for method, row in self.cells.items() if not row[family]]

    def adapters_of(self, method: str) -> tuple[str, ...]:
        """The adapters by which a method works on some family; none for one that is not of the package."""
        row = self.cells.get(method, {})
        return tuple(dict.fromkeys(self.adapters[family] for family, why in row.items() if not why))

    def filled(self, methods: Iterable[str], families: Iterable[str]) -> float:
        """The share of the cells of these methods and families in which the method works."""
        families = list(families)
        cells = [not self.cells[method][family] for method in methods for family in families]
        return sum(cells) / len(cells)

    def to_json(self) -> str:
        """The table; each reason stands once, and a cell has its number, 0 where the method works."""
        reasons = list(dict.fromkeys(why for row in self.cells.values() for why in row.values() if why))
        numbers = {why: number for number, why in enumerate(reasons, 1)} | {"": 0}
        rows = {
            method: " ".join(str(numbers[row[family]]) for family in self.adapters)
            for method, row in self.cells.items()
        }
        return json.dumps({"families": self.adapters, "reasons": reasons, "methods": rows}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MethodTable:
        """The inverse of `to_json`."""
        plain: dict[str, Any] = json.loads(text)
        reasons = ["", *plain["reasons"]]
        cells = {
            method: dict(zip(plain["families"], (reasons[int(number)] for number in row.split()), strict=True))
            for method, row in plain["methods"].items()
        }
        return cls(cells, plain["families"])


@cache
def shipped_table() -> MethodTable:
    """The table that comes with the package (`tokenprune methods --table --output tokenprune/method_families.json`)."""
    return MethodTable.from_json((resources.files("tokenprune") / FILE).read_text(encoding="utf-8"))
