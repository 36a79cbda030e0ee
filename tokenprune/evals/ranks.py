"""One run in several processes, as torchrun or `accelerate launch` start them: what each does, and what it all gives.

Whole batches are shared out, so that each image has the batch mates that it has in one process, and what the batches
gave is put together in their order before anything is computed of it: a result is the same to the last bit.
"""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tokenprune.errors import TokenPruneError
from tokenprune.evals.rank_line import Line

T = TypeVar("T")
R = TypeVar("R")

PIECE = 4 << 20
"""Bytes of one message; the store takes no more than twice as many."""

_current: Ranks | None = None  # of the with block that runs
_runs = itertools.count()


@dataclass
class Ranks:
    """The processes of a run: this one is `rank` of `count`. Every one of them makes the same calls in the same order.

    line: to the others, None where there are none.
    """

    rank: int = 0
    count: int = 1
    line: Line | None = None
    calls: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that shows progress, prints and writes."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """What of `items` is this process's: every `count`-th."""
        return list(items[self.rank :: self.count])

    def joined(self, parts: list[T], make: Callable[[list[T]], R]) -> R:
        """`make` of all parts in the order of the items, computed on rank 0 and known to all.

        parts: one for each item of `own`.
        """
        if self.line is None:
            return make(parts)
        call, self.calls = self.calls, self.calls + 1
        if not self.is_main:
            self._send(f"{call}/{self.rank}", parts)
            found: R = self._receive(f"{call}/0")
            return found
        each = [parts, *(self._receive(f"{call}/{rank}", once=True) for rank in range(1, self.count))]
        made = make([each[item % self.count][item // self.count] for item in range(sum(map(len, each)))])
        self._send(f"{call}/0", made)
        return made

    def from_main(self, make: Callable[[], R]) -> R:
        """What `make` gives on rank 0, where alone it is called."""
        return self.joined([], lambda _: make())

    def conditions(self) -> dict[str, str | int | float | bool | None]:
        """What a table says of them: how many, where they are several."""
        return {"processes": self.count} if self.count > 1 else {}

    def refuse_timing(self, rounds: int | None) -> None:
        """Raise TokenPruneError where rounds of timing are asked of several processes, which would wait for each other
        and for the same cores."""
        if rounds is not None and self.count > 1:
            raise TokenPruneError(f"rounds={rounds} of timing are for one process, and this run has {self.count}")

    def _send(self, name: str, value: object) -> None:
        assert self.line is not None
        store, data = self.line.store, pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        pieces = range(0, max(1, len(data)), PIECE)
        for number, start in enumerate(pieces):
            piece = data[start : start + PIECE]
            self.line.ask(partial(store.set, f"{name}/{number}", piece))
        self.line.ask(lambda: store.set(name, str(len(pieces))))

    def _receive(self, name: str, *, once: bool = False) -> Any:
        """What was sent by that name; once: nobody else reads it."""
        assert self.line is not None
        line, store, pause = self.line, self.line.store, 0.001
        while not line.ask(lambda: store.check([name])):
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
        pieces = []
        for number in range(int(line.ask(lambda: store.get(name)))):
            key = f"{name}/{number}"
            pieces.append(line.ask(partial(store.get, key)))
            if once:
                line.ask(partial(store.delete_key, key))
        return pickle.loads(b"".join(pieces))  # written by a process of this very run


ALONE = Ranks()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that run the with block together: those of the launcher's environment, or this one alone. Within
    such a block it gives the same again.

    Raises:
        TokenPruneError: in the others, when one stops with an error, dies, or does not come; its rank is named.
    """
    global _current
    rank, count = launched()
    if _current is not None or count == 1:
        yield _current or ALONE
        return
    line = Line(rank, count, next(_runs))
    _current = Ranks(rank, count, line)
    try:
        yield _current
        line.leave()
    except BaseException as error:
        with suppress(KeyboardInterrupt):  # the line's own may be on its way
            line.stop(error)
        if isinstance(error, KeyboardInterrupt) and line.trouble is not None:
            raise TokenPruneError(line.trouble) from None
        raise
    finally:
        line.close()
        _current = None


def launched() -> tuple[int, int]:
    """(rank, number of processes) as a launcher's environment says; (0, 1) without one."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if None in told:
        return 0, 1
    return int(told[0] or 0), int(told[1] or 1)


def is_main() -> bool:
    """Whether this process is rank 0 of those that run together, or alone."""
    return _current is None or _current.is_main


def own_device(device: str) -> str:
    """`device`, but of several processes of a machine each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None and launched()[1] > 1 else device
