"""An answer of a LLaVA-1.5-7B with random weights, whole and pruned, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from tokenprune.evals.cases import Case
from tokenprune.evals.lvlm_speed import METHODS, speed_table
from tokenprune.evals.random_llava import llava
from tokenprune.evals.real_denoisers import created_on
from tokenprune.evals.table import Row

SHAPE: dict[str, Any] = {
    "layers": 32,
    "width": 4096,
    "head_width": 128,
    "intermediate": 11008,
    "tower_layers": 24,
    "tower_width": 1024,
}
TOKENS = 64  # of 576 visual ones


def lvlm_cases(device: torch.device, dtype: torch.dtype, *, rounds: int = 20, attempts: int = 2) -> Iterator[Case]:
    """A case for each of METHODS, with the columns of `tokenprune.evals.lvlm_speed.speed_table` and a row of the
    unpatched model that stood beside it."""
    made = cache(partial(_made, device, dtype))
    for method in METHODS:
        labels: Row = {"measurement": method, "dtype": str(dtype).removeprefix("torch.")}
        yield Case(labels, partial(_rows, made, method, rounds, attempts))


def _made(device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with created_on(device, dtype):
        model = llava(**SHAPE)
    return model.to(device, dtype)


def _rows(made: Callable[[], nn.Module], method: str, rounds: int, attempts: int) -> list[Row]:
    table = speed_table(made(), [method], tokens=TOKENS, rounds=rounds, attempts=attempts)
    unpatched, patched = table.rows
    return [unpatched, patched | {name: table.environment[name] for name in ("control", "trusted")}]
