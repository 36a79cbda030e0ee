"""Progress bars that can be silenced and that need no package to be absent."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TypeVar, cast

T = TypeVar("T")


def progress(steps: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterable[T]:
    """`steps` with a bar on standard error, where that is a terminal, `show` is True and tqdm is installed."""
    if not show or find_spec("tqdm") is None:
        return steps
    from tqdm import tqdm

    return cast("Iterable[T]", tqdm(steps, desc=what, total=total, leave=False, dynamic_ncols=True, disable=None))
