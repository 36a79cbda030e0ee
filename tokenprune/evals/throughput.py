"""The one timing protocol: unpatched, patched and unpatched again, interleaved in one process.

The second unpatched arm is the control. Whatever differs between the two unpatched arms is not the method's doing, so a
ratio between them that is not close to 1 means that the machine was not quiet enough to believe the speed-up either.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.stats import Interval, bootstrap_median
from tokenprune.evals.table import Row, interval_cells

Arm = Callable[[], object]
CONTROL_TOLERANCE = 0.02
LEAST_ROUNDS = 20


@dataclass(frozen=True)
class Timing:
    """What one A, B, A' measurement found.

    Times are in seconds per forward; `speedup` is the median over rounds of (time of A) / (time of B), `control` that
    of (time of A) / (time of A'). `trusted` says whether `control` was within 2% of 1 in one of `attempts` attempts.
    Peak memory is in bytes, weights and inputs included, or None where it cannot be measured (outside CUDA).
    """

    rounds: int
    forwards_per_sample: int
    seconds: float
    seconds_patched: float
    speedup: Interval
    control: float
    trusted: bool
    attempts: int
    peak_memory: int | None
    peak_memory_patched: int | None


def measure(
    reference: Arm,
    candidate: Arm,
    control: Arm,
    *,
    rounds: int = 20,
    warmup: int = 3,
    sample_seconds: float = 0.02,
    attempts: int = 3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times `candidate` (B) against `reference` (A) with `control` (A', the same work as A) beside them.

    Each round runs the three arms once, in an order that goes through all six in turn; each sample repeats the forward
    until the reference takes at least `sample_seconds`. The measurement is repeated up to `attempts` times until the
    control is within 2% of 1; the last attempt is returned either way. The choice looks at the control alone, never at
    the speed-up.

    Raises TokenPruneError for fewer than 20 rounds: the interval would be narrower than what is known.
    """
    if rounds < LEAST_ROUNDS:
        raise TokenPruneError(
            f"rounds={rounds}: the protocol needs at least {LEAST_ROUNDS} for its interval to mean something"
        )
    arms = (reference, candidate, control)
    device = torch.device(device)
    for _ in range(warmup):
        for arm in arms:
            arm()
    repeats = repeats_for(reference, sample_seconds, device, clock)
    attempt = 0
    trusted = False
    while not trusted and attempt < max(1, attempts):
        attempt += 1
        samples = _interleave(arms, rounds, repeats, device, clock)
        ratio = statistics.median(a / c for a, _, c in samples)
        trusted = abs(ratio - 1.0) <= CONTROL_TOLERANCE
    return Timing(
        rounds=rounds,
        forwards_per_sample=repeats,
        seconds=statistics.median(a for a, _, _ in samples) / repeats,
        seconds_patched=statistics.median(b for _, b, _ in samples) / repeats,
        speedup=bootstrap_median([a / b for a, b, _ in samples], seed=seed),
        control=ratio,
        trusted=trusted,
        attempts=attempt,
        peak_memory=peak_memory(reference, device),
        peak_memory_patched=peak_memory(candidate, device),
    )


@dataclass(frozen=True)
class Relative:
    """Of one arm of `measure_together`: `speedup` is the median over rounds of (time of the first arm) / (its time),
    `control` that of (time of the first arm) / (time of the last), `seconds` its median time."""

    speedup: Interval
    control: float
    seconds: float

    def cells(self) -> Row:
        """The cells of a table row."""
        trusted = abs(self.control - 1.0) <= CONTROL_TOLERANCE
        return {**interval_cells("speedup", self.speedup), "control": self.control, "trusted": trusted}


def measure_together(
    arms: Sequence[Arm],
    rounds: int = 20,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[Relative]:
    """Times many candidates against one reference: the first of `arms`, which the last, the control, does again.

    Every round runs each arm once, so that a busy moment hits all alike, and begins one arm further on, every other
    round backwards. For runs of a second or so, of which the reference need not be measured anew for each candidate.
    """
    for arm in arms:
        arm()
    device, taken = torch.device(device), [list[float]() for _ in arms]
    for number in range(rounds):
        order = [(place + number) % len(arms) for place in range(len(arms))]
        for place in order[:: 1 if number % 2 == 0 else -1]:
            taken[place].append(sample(arms[place], 1, device, clock))
    ratios = [[base / own for base, own in zip(taken[0], seconds, strict=True)] for seconds in taken]
    control = statistics.median(ratios[-1])
    return [
        Relative(bootstrap_median(own, seed=seed), control, statistics.median(seconds))
        for own, seconds in zip(ratios, taken, strict=True)
    ]


def _interleave(
    arms: tuple[Arm, Arm, Arm], rounds: int, repeats: int, device: torch.device, clock: Callable[[], float]
) -> Sequence[tuple[float, float, float]]:
    # Going through every order balances both the position in a round and the arm that ran just before.
    orders = itertools.cycle(itertools.permutations(range(3)))
    samples = []
    for order in itertools.islice(orders, rounds):
        taken = {index: sample(arms[index], repeats, device, clock) for index in order}
        samples.append((taken[0], taken[1], taken[2]))
    return samples


def repeats_for(arm: Arm, seconds: float, device: torch.device, clock: Callable[[], float]) -> int:
    """How often to call `arm` for a sample of `seconds`, at least once."""
    once = min(sample(arm, 1, device, clock) for _ in range(3))
    return max(1, math.ceil(seconds / once)) if once > 0 else 1


def sample(arm: Arm, repeats: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of `repeats` calls of `arm`."""
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        arm()
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waiting_clock(device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """`clock`, read when `device` has done all that it was given."""
    device = torch.device(device)

    def read() -> float:
        _synchronize(device)
        return clock()

    return read


def peak_memory(arm: Arm, device: torch.device) -> int | None:
    """Most bytes that are allocated during a call of `arm`, those from before it included; None outside CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    arm()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
