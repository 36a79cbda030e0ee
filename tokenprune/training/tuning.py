"""Training of the model's own weights under a method that acts in training forwards alone and learns nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.api import patched
from tokenprune.errors import BudgetError, TokenPruneError, UnsupportedMethod, UnsupportedModel
from tokenprune.finding import bare, find_models
from tokenprune.learned_parts import LearnedParts, architecture, block_norms, write_whole
from tokenprune.training.distillation import Distillation
from tokenprune.training.state import generators, set_generators
from tokenprune.training.taught import logits_of

RECORD = "model.json"


class Tuned(nn.Module):
    """What the optimiser and DDP see: a patched model in training mode. smoothing: of the labels. told: names of what
    the loss consists of."""

    told = ("loss",)

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing, self.progress = model, smoothing, 0.0

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy [] with labels, classes [B] or maps of them [B, h, w], and it without gradient, [1]."""
        logits = logits_of(self.model(images), labels)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        return loss, loss.detach().float()[None]


def check_tuning(method: str, flops: float | None, distill: Distillation, rate: float) -> None:
    """Raise for what has no meaning where the model's own weights are all that learns."""
    if flops is not None:
        raise BudgetError(f"flops={flops!r}: {method} draws what each training step leaves out itself; leave it out")
    if distill:
        raise UnsupportedMethod(
            f"distill_logits= and distill_tokens= compare with the unpatched model, and {method} trains that itself;"
            " leave them out"
        )
    if rate == 0:
        raise TokenPruneError(f"model_rate=0: with {method} the model's own weights are all that learns; use 1e-5")


def described(model: nn.Module, method: str, options: dict[str, Any]) -> LearnedParts:
    """Learned parts without tensors, which say of which model the trained weights are.

    Raises:
        UnsupportedModel: it is no model of windows.
    """
    found = find_models(model)
    tower, family = found[0]
    describe = getattr(family, "describe", None)
    if len(found) != 1 or describe is None:
        raise UnsupportedModel(f"{method} trains a model of windows with a classifier, not {type(model).__name__}")
    with bare(tower, family):
        host = describe(tower)
        return LearnedParts(method, options, {}, architecture(host, family.name), block_norms(host))


@contextmanager
def tuning(model: nn.Module, method: str, options: dict[str, Any], device: torch.device, seed: int) -> Iterator[None]:
    """The model on `device`, in training mode and patched, and the global generators seeded; all but its weights as it
    was behind it."""
    before, states = next(model.parameters()).device, generators()
    modes = {module: module.training for module in model.modules()}
    model.to(device)
    try:
        with patched(model, method, **options):
            model.train()
            torch.manual_seed(seed)
            yield
    finally:
        set_generators(states)
        for module, mode in modes.items():
            module.training = mode
        for parameter in model.parameters():
            parameter.grad = None
        model.to(before)


def write_record(folder: Path, parts: LearnedParts) -> None:
    """Write how the weights beside it were trained to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, parts.record())
