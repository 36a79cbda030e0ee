"""The training of a small model of the package: AdamW, one cycle, a fixed number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def fit(
    module: nn.Module, loss_at: Callable[[int], Tensor], steps: int, *, peak_rate: float, weight_decay: float
) -> None:
    """Trains `module` for `steps` steps on the loss that `loss_at` gives for each, and prints it now and then."""
    start = time.process_time()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=max(steps, 4))
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step + 1 == steps or (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.process_time() - start:.0f} s", flush=True)


def store(module: nn.Module, path: Path) -> None:
    """Writes the weights in half precision, and loads what was written: a record is of what is stored."""
    from safetensors.torch import save_file

    stored = {name: value.half() for name, value in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path)
    module.load_state_dict(stored)
