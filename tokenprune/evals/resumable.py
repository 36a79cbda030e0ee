"""What may be killed at any step and goes on exactly as it would have without: a training, a search."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.ranks import ALONE, Ranks


class Steps(Protocol):
    """Work in steps. step: how many are done. log: what is shown of them. seconds: of CPU time."""

    step: int
    log: list[dict[str, float]]
    seconds: float

    def advance(self) -> None:
        """One step, and now and then a line of the log."""

    def save(self, path: Path) -> None:
        """Writes the state in one piece."""

    def resume(self, path: Path) -> None:
        """The inverse of `save`."""


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Writes `state` in one piece: a kill while writing leaves the one before."""
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def read_state(path: Path) -> dict[str, Any]:
    """The inverse of `write_state`.

    Raises:
        TokenPruneError: the file holds none.
    """
    with damaged(path):
        state: dict[str, Any] = dict(torch.load(path, weights_only=True))
        return state


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """What fails in the with block is that the state in `path` cannot be used: TokenPruneError."""
    try:
        yield
    except TokenPruneError:
        raise
    except Exception as error:  # of a damaged file torch raises nearly anything
        raise TokenPruneError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged or no state of this release;"
            " delete it to begin anew, or name another --output"
        ) from error


class Resumable:
    """What a training consists of: weights and their moving average, further modules that are not shipped, optimiser,
    step, log, and CPU seconds. clip_norm: of the gradient. ema_decay: of the moving average, smaller in the first
    steps."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        ema_decay: float,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model, self.optimizer, self.others = model, optimizer, dict(others or {})
        self.clip_norm, self.ema_decay = clip_norm, ema_decay
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.recent: list[float] = []
        self.seconds = 0.0

    def descend(self, error: Tensor) -> None:
        """One step of the optimiser down a loss, and of the moving average."""
        self.optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm)
        self.optimizer.step()
        self.step += 1
        self.recent.append(error.item())
        decay = min(self.ema_decay, self.step / (10 + self.step))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                self.average[key].lerp_(value, 1 - decay)

    def recent_loss(self) -> float:
        """Mean loss of the steps since it was last asked for."""
        mean = math.fsum(self.recent) / len(self.recent)
        self.recent = []
        return mean

    def save(self, path: Path) -> None:
        """Writes the state in one piece."""
        state = {
            "model": self.model.state_dict(),
            **{name: module.state_dict() for name, module in self.others.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "log": self.log,
            "recent": self.recent,
            "seconds": self.seconds,
        }
        write_state(state, path)

    def resume(self, path: Path) -> None:
        """The inverse of `save`.

        Raises:
            TokenPruneError: a state of another model, or a damaged one.
        """
        state = read_state(path)
        with damaged(path):
            try:
                self.model.load_state_dict(state["model"])
            except RuntimeError as error:
                raise TokenPruneError(f"{path} is of another model; name an --output of its own") from error
            for name, module in self.others.items():
                module.load_state_dict(state[name])
            self.average = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.log, self.recent = state["step"], state["log"], state["recent"]
            self.seconds = state["seconds"]

    def advance(self) -> None:
        """One step, and now and then a line of the log."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rates:
    """Learning rates: a linear warm-up of so many steps to the peak, constant, and a linear descent to `last_share` of
    it over the last `cooldown_share` of the steps."""

    warmup: int
    cooldown_share: float
    last_share: float

    def __call__(self, step: int, steps: int, peak: float) -> float:
        warm = min(1.0, (step + 1) / self.warmup)
        left = (steps - step) / (self.cooldown_share * steps)
        return peak * warm * min(1.0, self.last_share + (1 - self.last_share) * left)


def run(
    training: Steps,
    output: Path,
    steps: int,
    *,
    show_every: int | None,
    save_every: int,
    processes: Ranks = ALONE,
) -> None:
    """All steps of `training`, or those that are left of one that stopped in the folder `output`, where of several
    `processes` rank 0 alone reads and writes. show_every: steps, None to print nothing."""
    state = output / "state.pt"
    if processes.is_main:
        output.mkdir(parents=True, exist_ok=True)
    if processes.from_main(state.exists):
        training.resume(state)
    while training.step < steps:
        training.advance()
        done = training.step == steps
        if not processes.is_main:
            continue
        if show_every is not None and (done or training.step % show_every == 0):
            shown = (f"{name} {value:.4g}" for name, value in training.log[-1].items() if name != "step")
            print(f"step {training.step}/{steps}", *shown, f"{training.seconds:.0f} s", sep="  ", flush=True)
        if done or training.step % save_every == 0:
            training.save(state)


def ship(training: Resumable, path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the averaged weights (fp16) to `path` and their record beside it; returns the record."""
    from safetensors.torch import save_file

    save_file({key: value.half() for key, value in training.average.items()}, path)
    record = {
        **record,
        "log": training.log,
        "training_cpu_seconds": round(training.seconds),
        "threads": torch.get_num_threads(),
    }
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return record
