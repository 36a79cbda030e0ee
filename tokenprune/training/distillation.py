"""Distillation: losses by which the unpatched model teaches what is learned (DynamicViT, Rao et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune import api
from tokenprune.budget import is_number
from tokenprune.errors import TokenPruneError
from tokenprune.patch import Patch


@dataclass(frozen=True)
class Distillation:
    """Weights of `logits_divergence` and `token_error` in the loss of a training."""

    logits: float = 0.0
    tokens: float = 0.0

    def __bool__(self) -> bool:
        return self.logits > 0 or self.tokens > 0


def checked_weight(name: str, value: object, *, example: float = 0.5) -> float:
    """`value` as the weight of a loss, or a learning rate.

    Raises:
        TokenPruneError: it is no number of at least 0.
    """
    if not is_number(value) or value < 0:
        raise TokenPruneError(f"{name} must be a number of at least 0, got {value!r}; for example {name}={example:g}")
    return float(value)


def logits_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence [] of the student's classes from the teacher's, both logits [B, classes]: the mean
    over images (equation 10)."""
    own, given = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(own, given, reduction="batchmean", log_target=True)


def token_error(student: Tensor, teacher: Tensor, alive: Tensor) -> Tensor:
    """Mean squared difference [] of layer-normalised tokens [B, n, C], over those that are `alive` [B, n], which are
    given no gradient (equation 9)."""
    kept = alive.detach() > 0
    own, given = (F.layer_norm(x[kept].float(), x.shape[-1:]) for x in (student, teacher))
    return (own - given).square().sum() / max(own.numel(), 1)


def twin(model: nn.Module) -> nn.Module:
    """An unpatched copy, that stays as it is while the model's own weights are trained."""
    return api.unpatch(deepcopy(model)).eval().requires_grad_(False)


@contextmanager
def unpatched(patch: Patch) -> Iterator[None]:
    """Forwards of the patched model are those of the unpatched one, without gradients."""
    active, patch.active = patch.active, False
    try:
        with torch.no_grad():
            yield
    finally:
        patch.active = active


@contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """What a block puts out in the forwards inside."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Tensor) -> None:
        caught.append(output)

    handle = block.register_forward_hook(catch)
    try:
        yield caught
    finally:
        handle.remove()
