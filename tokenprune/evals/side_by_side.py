"""Several ways of doing the same, timed in turn in one process, so that what slows the machine down slows all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval, bootstrap_median
from tokenprune.evals.throughput import CONTROL_TOLERANCE, Arm, repeats_for, sample

CONTROL = "control"


@dataclass(frozen=True)
class SideBySide:
    """seconds: of a call, by way and round; the way `CONTROL` is the reference once more."""

    reference: str
    seconds: dict[str, list[float]]

    def ratio(self, way: str, over: str) -> Interval:
        """Median over the rounds of (time of `way`) / (time of `over`), with a 95% bootstrap interval."""
        pairs = zip(self.seconds[way], self.seconds[over], strict=True)
        return bootstrap_median([mine / other for mine, other in pairs])

    def median(self, way: str) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds[way])

    @property
    def control(self) -> float:
        """The reference over itself."""
        return self.ratio(self.reference, CONTROL).estimate

    @property
    def trusted(self) -> bool:
        """Whether `control` is within 2% of 1."""
        return abs(self.control - 1.0) <= CONTROL_TOLERANCE


def side_by_side(
    ways: Mapping[str, Arm],
    reference: str,
    *,
    rounds: int = 20,
    sample_seconds: float = 0.02,
    attempts: int = 3,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> SideBySide:
    """Each of `ways` and the `reference` once more in every round, in the order of `turns`.

    A sample repeats the call until the reference takes `sample_seconds`; the measurement is repeated up to `attempts`
    times until the reference over itself is within 2% of 1, as in `tokenprune.evals.throughput.measure`.

    Raises TokenPruneError for fewer than 20 rounds.
    """
    arms, device = {**ways, CONTROL: ways[reference]}, torch.device(device)
    orders = turns(list(arms), rounds)
    for arm in ways.values():
        arm()
    repeats = repeats_for(ways[reference], sample_seconds, device, clock)
    for _ in range(max(1, attempts)):
        found = SideBySide(reference, {name: [] for name in arms})
        for order in orders:
            for name in order:
                found.seconds[name].append(sample(arms[name], repeats, device, clock) / repeats)
        if found.trusted:
            break
    return found


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of the ways in each round: turned by one from round to round, and reversed every time it has come full
    circle.

    Raises TokenPruneError for fewer than 20 rounds.
    """
    if rounds < 20:
        raise TokenPruneError(f"rounds={rounds}: the protocol needs at least 20 for its interval to mean something")
    orders = []
    for turn in range(rounds):
        first = turn % len(names)
        order = [*names[first:], *names[:first]]
        orders.append(order if turn // len(names) % 2 == 0 else order[::-1])
    return orders
