"""Never slower: measured latency of a model on this device, and what a patch is predicted to take by it.

A table is made by `tokenprune bench --save-profile` and lies in the user's cache; where there is none nothing is said,
and nothing is ever timed when a model is patched.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from tokenprune.budget import is_number
from tokenprune.errors import MALFORMED, SlowdownError, TokenPruneError

VERSION = 1
CACHE = "TOKENPRUNE_CACHE"
NOT_CHECKED = "speed not checked here"


@dataclass(frozen=True)
class LatencyRow:
    """What was measured at one batch size and resolution, all as a share of the unpatched forward.

    batch: images. tokens: prunable ones that enter. flops, latency: multiply-adds, falling from 1, and the time that
    they take. overhead: of a method, the time by which a place makes its forward longer than its multiply-adds say.
    """

    batch: int
    tokens: int
    flops: tuple[float, ...]
    latency: tuple[float, ...]
    overhead: Mapping[str, float]

    def __post_init__(self) -> None:
        numbers = (self.batch, self.tokens, *self.flops, *self.latency, *self.overhead.values())
        if not self.flops or len(self.flops) != len(self.latency) or not all(map(is_number, numbers)):
            raise TypeError(f"a row of batch={self.batch!r} and tokens={self.tokens!r} is no row of finite numbers")
        if not all(isinstance(count, int) and count > 0 for count in (self.batch, self.tokens)):
            raise TypeError(f"batch={self.batch!r} and tokens={self.tokens!r} must be whole numbers")

    def predicted(self, method: str, flops: float, places: int) -> float | None:
        """Time of a forward with a share `flops` of the multiply-adds that reduces at `places`, None for a method that
        was not measured. Below the fewest multiply-adds that were measured it is no less than there."""
        if method not in self.overhead:
            return None
        return self.of_flops(flops) + places * self.overhead[method]

    def of_flops(self, flops: float) -> float:
        """The time that multiply-adds take, between those that were measured."""
        falling = sorted(zip(self.flops, self.latency, strict=True))
        xs, ys = [x for x, _ in falling], [y for _, y in falling]
        right = bisect_left(xs, flops)
        if right == 0 or right == len(xs):
            return ys[0] if right == 0 else ys[-1]
        weight = (flops - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + weight * (ys[right] - ys[right - 1])


@dataclass(frozen=True)
class LatencyTable:
    """The rows of one model on one device, in one dtype, with how they were measured."""

    rows: tuple[LatencyRow, ...]
    environment: Mapping[str, str | int | float | bool | None]

    def predicted(self, method: str, tokens: int, flops: float, places: int) -> dict[tuple[int, int], float]:
        """{(batch, tokens): time} of the rows with so many tokens, as `LatencyRow.predicted`, where that is known."""
        rows = ((row, row.predicted(method, flops, places)) for row in self.rows if row.tokens == tokens)
        return {(row.batch, tokens): share for row, share in rows if share is not None}

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n", encoding="utf-8")


def table_path(model: nn.Module) -> Path:
    """Where the table of `model` lies, as it is now: on its device, in its dtype, with the threads of this process."""
    parameter = next(model.parameters())
    told = [device_name(parameter.device), str(parameter.dtype)]
    if parameter.device.type == "cpu":
        told.append(str(torch.get_num_threads()))
    told += [f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    return tables_folder() / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}.json"


def tables_folder() -> Path:
    """Where the tables of this user lie."""
    return _cache() / "latency"


def load_table(model: nn.Module) -> LatencyTable | None:
    """The table of `model`, None where there is none.

    Raises:
        TokenPruneError: the file is not one that this release has written.
    """
    if not tables_folder().is_dir() or not (path := table_path(model)).is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise TokenPruneError(f"{path} has version {data['version']!r}; measure anew or delete it")
        rows = (
            LatencyRow(row["batch"], row["tokens"], tuple(row["flops"]), tuple(row["latency"]), row["overhead"])
            for row in data["rows"]
        )
        return LatencyTable(tuple(rows), {**data["environment"]})
    except TokenPruneError:
        raise
    except MALFORMED as error:
        raise TokenPruneError(f"{path} is no latency table: {error!r}; measure anew or delete it") from error


def told_speed(
    predicted: Mapping[tuple[int, int], float], *, required: bool, steady: bool = True, unknown: str = ""
) -> tuple[str, str]:
    """What the report says of a patch, and a warning, empty where nothing is slower.

    predicted: {(batch, tokens): share of the unpatched time}. steady: whether the unpatched model took as long as
    itself when the table was measured. unknown: why no table predicts anything of this patch, and what to do; empty
    where one could.

    Raises:
        SlowdownError: something is slower, or nothing or nothing steady is known, and a speed-up was `required`.
    """
    if not predicted and unknown:
        if required:
            raise SlowdownError(f"{NOT_CHECKED}: {unknown}, or leave require_speedup out")
        return f"{NOT_CHECKED}: {unknown}", ""
    if not predicted:
        if required:
            raise SlowdownError(
                f"{NOT_CHECKED}: there is no latency table for this model, device, dtype, number of threads and method."
                " Measure one with tokenprune bench --save-profile, or leave require_speedup out"
            )
        return f"{NOT_CHECKED} (tokenprune bench --save-profile measures it)", ""
    if required and not steady:
        raise SlowdownError(
            "the latency table of this model was measured while the machine was not quiet; measure it anew with"
            " tokenprune bench --save-profile, or leave require_speedup out"
        )
    told = [
        f"{1 / share:.2f} at batch {batch}, {tokens} tokens" for (batch, tokens), share in sorted(predicted.items())
    ]
    slower = [text for text, (_, share) in zip(told, sorted(predicted.items()), strict=True) if share >= 1.0]
    warning = ""
    if slower:
        warning = (
            f"by the latency table of this device the patched model is not faster: {'; '.join(slower)} times as fast."
            " Use a smaller budget, another method, fewer places, or none"
        )
        if required:
            raise SlowdownError(warning)
    doubt = "" if steady else " (measured while the machine was not quiet)"
    return f"predicted speed-up {'; '.join(told)}{doubt}", warning


def device_name(device: torch.device) -> str:
    """What a time depends on: the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(CACHE) or Path(base) / "tokenprune")
