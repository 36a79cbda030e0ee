"""A schedule as a file: what a search has found for a model, and those that are shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from tokenprune.budget import parse_budget
from tokenprune.errors import MALFORMED, BudgetError

VERSION = 1
SUFFIX = ".json"


@dataclass(frozen=True)
class StoredSchedule:
    """A method, its options, and {block: share of the entering tokens that leave}, with how they were found. restore:
    what they were found with (see `tokenprune.patch`), None for the method's own.

    `tokenprune.patch(model, schedule=found)` takes one, the file that `save` writes, or the name of a shipped one.
    """

    method: str
    schedule: Mapping[int | str, float]
    options: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    restore: str | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Writes it to `path` as JSON."""
        data = {
            "version": VERSION,
            "method": self.method,
            "options": dict(self.options),
            **({} if self.restore is None else {"restore": self.restore}),
            "schedule": {str(block): share for block, share in self.schedule.items()},
            "found": dict(self.found),
        }
        Path(path).write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_schedule(source: str | PathLike[str]) -> StoredSchedule:
    """The schedule in the file `source`, or the shipped one of that name.

    Raises:
        BudgetError: there is none, or it is no schedule.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_bytes()
    elif str(source) in shipped_schedules():
        text = _folder().joinpath(f"{source}{SUFFIX}").read_bytes()
    else:
        raise BudgetError(
            f"schedule={str(source)!r} is neither a file nor shipped; shipped are {', '.join(shipped_schedules())}, and"
            " a file is what tokenprune search writes"
        )
    try:
        data = json.loads(text)
        if data["version"] != VERSION:
            raise BudgetError(f"{source} has version {data['version']!r}; this release reads version {VERSION}")
        stored = StoredSchedule(data["method"], data["schedule"], data["options"], data["found"], data.get("restore"))
    except BudgetError:
        raise
    except UnicodeDecodeError as error:
        raise BudgetError(f"{source} is no schedule that tokenprune search has written: {error.reason}") from error
    except MALFORMED as error:
        raise BudgetError(f"{source} is no schedule that tokenprune search has written: {error!r}") from error
    if not isinstance(stored.method, str) or not isinstance(stored.options, Mapping):
        raise BudgetError(f"{source} is no schedule that tokenprune search has written: no method with its options")
    parse_budget(schedule=stored.schedule)
    return stored


def shipped_schedules() -> tuple[str, ...]:
    """Names of the schedules in the package: model, method and share of the multiply-adds."""
    return tuple(sorted(entry.name.removesuffix(SUFFIX) for entry in _folder().iterdir() if _is_schedule(entry.name)))


def _is_schedule(name: str) -> bool:
    return name.endswith(SUFFIX)


def _folder() -> Any:
    return resources.files("tokenprune") / "schedules"
