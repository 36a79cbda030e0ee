"""Taught: a model and its learned parts as one module, whose output is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.errors import TokenPruneError
from tokenprune.learning import Lesson
from tokenprune.patch import Patch


class Taught(nn.Module):
    """What the optimiser and DDP see. model: patched by `patch`. width: channels of its tokens. flops: the budget.
    smoothing: of the labels. across: the mean of a tensor over all processes."""

    def __init__(
        self,
        model: nn.Module,
        patch: Patch,
        *,
        width: int,
        flops: float,
        smoothing: float,
        across: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        assert patch.learned is not None
        self.model, self.parts = model, patch.learned
        self.patch, self.width, self.flops = patch, width, flops
        self.smoothing, self.across = smoothing, across

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [], and of what it consists [3]: that of the task, that of the budget, and the share of the prunable
        tokens behind the last place."""
        patch, learned = self.patch, self.patch.method.learned
        assert learned is not None
        # It stays until the next forward: where gradient checkpointing runs a block once more, it is looked for again.
        patch.lesson = lesson = Lesson(
            tokens=patch.num_prefix_tokens + patch.tokens,
            prunable=patch.tokens,
            width=self.width,
            depth=patch.depth,
            counted=self._counted,
            across=self.across,
        )
        logits = _logits(self.model(images))
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise TokenPruneError(
                f"labels from {int(labels.min())} to {int(labels.max())}, and the model has {logits.shape[-1]} classes"
            )
        lesson.prunable = patch.entered
        lesson.tokens = patch.num_prefix_tokens + patch.entered
        task = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        penalty = learned.penalty(lesson, self.flops)
        last = lesson.alive[max(lesson.alive)].mean()
        return task + penalty, torch.stack([task, penalty, last]).detach()

    def _counted(self, leaving: Mapping[int, float]) -> float:
        costs, tokens = self.patch.costs, self.patch.entered
        assert costs is not None
        return costs.total(tokens, leaving, adaptive=True) / costs.total(tokens)


def _logits(output: object) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TokenPruneError(
            "the model's output is no logits [B, classes], which the labels are compared with: train on a model with a"
            " classifier"
        )
    return logits
