"""The line of one process to the others of its run: who lives, who has stopped, and why."""

from __future__ import annotations

import _thread
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch

from tokenprune.errors import TokenPruneError

T = TypeVar("T")
distributed: Any = torch.distributed  # which does not export the stores for type checkers

SIGN = 1.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a process counts as dead."""
ABSENCE = 300.0
"""Seconds that the others are waited for at the beginning."""


class Line:
    """The connection of process `rank` of `count` to the store at which all of them meet, in their `run`-th run.

    A store on a machine that is gone never answers, so one thread alone talks to it, `ask` gives up waiting for that
    one, and a third interrupts the main thread in the midst of its work. Rank 0 looks after all, the others after it.
    """

    def __init__(self, rank: int, count: int, run: int) -> None:
        self.rank, self.count = rank, count
        self.trouble: str | None = None
        self.store = _store(rank, count, run)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._over, self._asking = threading.Event(), False
        self._quiet = 0.0
        others = range(1, count) if rank == 0 else [0]
        self._signs = dict.fromkeys(others, (0, time.monotonic()))
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._ignored = self._interrupts and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if self._ignored:  # as in a shell's background: an interrupt from here would be ignored too
            signal.signal(signal.SIGINT, self._on_interrupt)
        for target in (self._talk, self._judge):
            threading.Thread(target=target, name=f"tokenprune {target.__name__}", daemon=True).start()

    def ask(self, job: Callable[[], T]) -> T:
        """What `job` gives, which talks to the store.

        Raises:
            TokenPruneError: the run cannot go on.
        """
        answer: Future[T] = Future()
        self._asking = True
        self._jobs.put((job, answer))
        try:
            while not wait([answer], SIGN / 4).done:
                self._check()
        finally:
            self._asking = False
        return answer.result()

    def _on_interrupt(self, *_: object) -> None:
        if self.trouble is not None:
            raise KeyboardInterrupt

    def close(self) -> None:
        """Interrupts are ignored again where they were before."""
        if self._ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave(self) -> None:
        """The end of the run, of which rank 0, at whose store all meet, is the last."""
        if self.rank:
            self.ask(self._left)
            return
        names = [f"left/{rank}" for rank in range(1, self.count)]
        while not self.ask(lambda: self.store.check(names)):
            time.sleep(SIGN / 50)
        self._over.set()

    def stop(self, error: BaseException) -> None:
        """An end by an error, which the others are told unless they know; rank 0 leaves them the time to hear it."""
        self._interrupts, told = False, self.trouble
        if told is None:
            told = f"rank {self.rank} of {self.count} stopped: {type(error).__name__}: {error}"
        answer: Future[None] = Future()
        self._jobs.put((lambda: self.store.set("stopped", told), answer))
        wait([answer], SIGN)
        if self.rank == 0:
            time.sleep(3 * SIGN)
        self._over.set()

    def _left(self) -> None:
        self.store.set(f"left/{self.rank}", "")
        self._over.set()  # at once: rank 0 may be gone when the store is asked again

    def _check(self) -> None:
        if self.trouble is None and self._quiet > SILENCE:
            self.trouble = f"{self._who(0)} has not answered for {self._quiet:.0f} s: it or its machine is dead"
        if self.trouble is not None:
            raise TokenPruneError(self.trouble)

    def _talk(self) -> None:
        following = 0.0
        try:
            while not self._over.is_set() and self.trouble is None:
                left = following - time.monotonic()
                if left <= 0:
                    self._sign()
                    following = time.monotonic() + SIGN
                    continue
                try:
                    job, answer = self._jobs.get(timeout=left)
                except queue.Empty:
                    continue
                answer.set_result(job())
                self._quiet = 0.0
        except Exception as error:  # of a lost connection torch raises several
            if not self._over.is_set():
                self.trouble = f"{self._who(0)} is gone, and with it the store at which all meet ({error})"

    def _sign(self) -> None:
        """Give a sign of life, and look for those of others."""
        self.store.add(f"sign/{self.rank}", 1)
        if self.store.check(["stopped"]):
            self.trouble = self.store.get("stopped").decode()
            return
        self._quiet, now = 0.0, time.monotonic()
        for other, (count, since) in self._signs.items():
            found = self.store.add(f"sign/{other}", 0)
            if found != count:
                self._signs[other] = found, now
            elif found == 0 and now - since > ABSENCE:
                self._give_up(
                    f"{self._who(other)} has not come within {ABSENCE:g} s; all processes make the same calls"
                )
            elif found and now - since > SILENCE and not self.store.check([f"left/{other}"]):
                self._give_up(f"{self._who(other)} has given no sign of life for {SILENCE:g} s: it has died or hangs")

    def _give_up(self, why: str) -> None:
        self.store.set("stopped", why)
        self.trouble = why

    def _judge(self) -> None:
        while not self._over.wait(SIGN / 4):
            self._quiet += SIGN / 4  # turns, not the clock: a process that stood still has missed nothing
            try:
                self._check()
            except TokenPruneError:
                if not self._asking:  # which finds it out by itself
                    if self._interrupts:
                        _thread.interrupt_main()
                    return

    def _who(self, rank: int) -> str:
        return f"rank {rank} of {self.count}"


def _store(rank: int, count: int, run: int) -> Any:
    """That at which all meet; names in it are this run's own."""
    if not distributed.is_available():
        raise TokenPruneError("this build of torch has no torch.distributed, and cannot run in several processes")
    server = _server(rank, count, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"tokenprune/{attempt}/{run}", server)


@cache
def _server(rank: int, count: int, host: str, port: int) -> Any:
    """The launcher's store, or else that of rank 0, which serves as long as the process lives."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return distributed.TCPStore(
            host,
            port,
            count,
            serves,
            timeout=timedelta(seconds=ABSENCE),
            wait_for_workers=False,
            multi_tenant=True,  # a process group of the caller's may serve at that port already
        )
    except RuntimeError as error:
        raise TokenPruneError(
            f"rank {rank} of {count} cannot meet rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT): {error}"
        ) from error
