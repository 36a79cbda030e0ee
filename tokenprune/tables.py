"""Small tensors that follow from shapes alone, made once and not in every forward: on a GPU each operation that a
forward starts takes the host some 20 microseconds, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock

import torch
from torch import Tensor

MOST = 512
"""Tables that are held at most; the oldest goes first, but for those that a CUDA graph has captured, which reads their
memory whenever it is replayed."""

_CPU = torch.device("cpu")
_HELD: dict[tuple[Hashable, ...], Tensor] = {}
_CAPTURED: dict[tuple[Hashable, ...], Tensor] = {}
_LOCK = Lock()


def table(make: Callable[..., Tensor], *key: Hashable, like: Tensor) -> Tensor:
    """`make(*key, device)` on the device of `like`, held for the next call; never to be written to.

    Made on the CPU, from where it is copied at once, so that every thread and stream finds it complete. Where tensors
    have no values of their own (meta, fake, traced, or transformed by torch.func) it is made anew.
    """
    device = like.device
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or type(like) is not Tensor or like.is_meta or is_wrapped(like):
        return make(*key, device)
    place = (make, *key, device)
    found = _HELD.get(place)
    if found is None:
        with torch.inference_mode(False):
            found = make(*key, _CPU).to(device)
        if type(found) is Tensor and not is_wrapped(found):
            with _LOCK:
                while len(_HELD) >= MOST:
                    del _HELD[next(iter(_HELD))]
                _HELD[place] = found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[place] = found
    return found


def positions(count: int, like: Tensor) -> Tensor:
    """0 to `count` - 1, on the device of `like`."""
    return table(_positions, count, like=like)


def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def is_wrapped(x: Tensor) -> bool:
    """Whether x is a tensor of torch.func's transforms, which has no storage of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
