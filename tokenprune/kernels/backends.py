"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError

logger = logging.getLogger("tokenprune.kernels")

_asked: ContextVar[str | None] = ContextVar("tokenprune_kernel_backend", default=None)


@dataclass(frozen=True)
class Choice:
    """The implementation that an operation takes, and why in words."""

    backend: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask every operation inside for "eager" (torch, any device) or "triton" (CUDA, or a CPU under TRITON_INTERPRET=1).

    It is read when an operation runs, so models compiled before obey it as well, but for what was compiled to torch's
    own operations (`tokenprune.kernels.merge`); another thread needs its own.

    Raises:
        TokenPruneError: there is no such implementation; an operation that cannot do as asked raises the same.
    """
    if name not in ("eager", "triton"):
        raise TokenPruneError(f"backend {name!r}: use 'eager' or 'triton'")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def forced(backend: str, *tensors: Tensor, names: tuple[str, ...] = ("eager", "triton")) -> Choice | None:
    """The choice that the caller made, by the operation's own argument (empty: none) or else by `use_backend`; or None.

    Raises:
        TokenPruneError: it is none of `names`, or Triton cannot take the tensors.
    """
    asked = backend or _asked.get()
    if not asked:
        return None
    if asked not in names:
        raise TokenPruneError(f"backend {asked!r}: use one of {', '.join(map(repr, names))}")
    refused = refuse_triton(*tensors) if asked == "triton" else None
    if refused is not None:
        raise TokenPruneError(f"backend 'triton': {refused}; leave it out, or use 'eager'")
    return Choice(asked, "asked for")


def triton_on_gpu(*tensors: Tensor) -> bool:
    """Whether these are tensors on a GPU that Triton can take."""
    return tensors[0].device.type == "cuda" and refuse_triton(*tensors) is None


def refuse_triton(*tensors: Tensor) -> str | None:
    """Why Triton cannot take these tensors; None if it can."""
    device, dtypes = tensors[0].device, {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return "Triton takes float16, bfloat16 and float32 here"
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no Triton for {device.type} tensors here (on a CPU it needs TRITON_INTERPRET=1, which is for tests)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton is compiled for compute capability 8.0 and above"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def log_once(operation: str, choice: Choice) -> None:
    """Each choice goes to the log once, at level DEBUG."""
    if logger.isEnabledFor(logging.DEBUG):
        _log_once(operation, choice)


@functools.lru_cache(maxsize=256)
def _log_once(operation: str, choice: Choice) -> None:
    logger.debug("%s: %s, %s", operation, choice.backend, choice.reason)
