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


def push_into(out: Tensor, attention: Tensor, mass: Tensor, keys: int, counts: Sequence[int], tolerance: float) -> None:
    """As `iterate` with a product with `attention` [n, M, columns], of which the first `keys` columns are keys, from
    `mass` [n, 1, M] on, into out [len(counts), n, 1, columns].

    Of such small products the memory and the views for each would take a third of the time, so two buffers take turns.
    """
    if tolerance:
        (settled,) = iterate(lambda mass: torch.bmm(mass, attention)[..., :keys], mass, counts, tolerance)
        out[0, ..., :keys] = settled
        return
    spare = out.new_empty(2, *out.shape[1:])
    turns = list(zip(spare, spare[..., :keys], strict=True))
    results = dict(zip(counts, zip(out, out[..., :keys], strict=True), strict=True))
    for done in range(1, counts[-1] + 1):
        pushed, after = results.get(done) or turns[done % 2]
        torch.bmm(mass, attention, out=pushed)
        mass = after


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
