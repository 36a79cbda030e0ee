"""Pictures that take long to draw, kept batch by batch: a run that was stopped goes on where it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def draw_missing(folder: Path, batches: int, draw: Callable[[int], Tensor]) -> None:
    """Draw the batches that `folder` does not have. draw: number of a batch -> its pictures [B, C, H, W]."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(batches):
        file = _file(folder, number)
        if not file.exists():
            part = file.with_suffix(".part")
            save_file({"pictures": draw(number).float().cpu().contiguous()}, part)
            part.replace(file)


def kept(folder: Path, batches: int) -> Tensor | None:
    """All pictures [N, C, H, W] in `folder`, None where a batch is missing."""
    files = [_file(folder, number) for number in range(batches)]
    if not all(file.exists() for file in files):
        return None
    return torch.cat([load_file(file)["pictures"] for file in files])


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"
