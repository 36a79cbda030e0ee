"""How often the mass is pushed, whatever pushes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def iterate(push: Callable[[Tensor], Tensor], mass: Tensor, counts: Sequence[int], tolerance: float) -> list[Tensor]:
    """The mass [..., N] after each of the rising `counts` of pushes; with a `tolerance`, once it has settled."""
    if tolerance:
        return [_settle(push, mass, counts[-1], tolerance)]
    wanted = []
    for done in range(1, counts[-1] + 1):
        mass = push(mass)
        if done in counts:
            wanted.append(mass)
    return wanted


def _settle(push: Callable[[Tensor], Tensor], mass: Tensor, most: int, tolerance: float) -> Tensor:
    """Push until each head's mass changes by less than `tolerance`, at most `most` times."""
    moving = torch.ones_like(mass[..., :1], dtype=torch.bool)
    for _ in range(most):
        pushed = push(mass)
        change = (pushed - mass).abs().sum(-1, keepdim=True)
        # A head that has settled stays, so that its result does not depend on the others beside it.
        mass = torch.where(moving, pushed, mass)
        moving = moving & (change >= tolerance)
        if not moving.any():
            break
    return mass
