"""What each thread has of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OfThread(threading.local, Generic[T]):
    """One `value` for each thread, what `make` gives; made once and changed in place, as torch.compile loses what a
    compiled block sets anew in a thread's storage."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.value = make()
