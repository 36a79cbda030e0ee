"""Taught: a model and its learned parts as one module, whose output is the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.errors import TokenPruneError
from tokenprune.learning import Lesson
from tokenprune.patch import Patch
from tokenprune.training.distillation import Distillation, logits_divergence, outputs_of, token_error, unpatched


class Taught(nn.Module):
    """What the optimiser and DDP see. model: patched by `patch`. last: its last block. width: channels of its tokens.
    flops: the budget. smoothing: of the labels. across: the mean of a tensor over all processes."""

    def __init__(
        self,
        model: nn.Module,
        patch: Patch,
        *,
        last: nn.Module,
        width: int,
        flops: float,
        smoothing: float,
        distill: Distillation,
        across: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        assert patch.learned is not None
        self.model, self.parts = model, patch.learned
        self.patch, self.width, self.flops = patch, width, flops
        self.smoothing, self.distill, self.across = smoothing, distill, across
        self.last = (last,)  # no submodule twice

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [], and of what it consists [3]: that of the task with distillation, that of the budget, and the
        share of the prunable tokens behind the last place."""
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
        teacher = self._teacher(images) if self.distill else None
        logits, tokens = self._forward(images)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
            raise TokenPruneError(
                f"labels from {int(labels.min())} to {int(labels.max())}, and the model has {logits.shape[-1]} classes"
            )
        if not patch.method.adaptive:
            lesson.leaving = patch.counts(patch.entered)
        lesson.prunable = patch.entered
        lesson.tokens = patch.num_prefix_tokens + patch.entered
        task = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        if teacher is not None:
            task = task + self._distilled(logits, tokens, *teacher)
        penalty = learned.penalty(lesson, self.flops)
        told = (torch.as_tensor(one, dtype=torch.float32, device=task.device) for one in (task, penalty, lesson.left()))
        return task + penalty, torch.stack([one.detach() for one in told])

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the tokens behind the last block where they are compared."""
        if not self.distill.tokens:
            return _logits(self.model(images)), None
        with outputs_of(self.last[0]) as caught:
            logits = _logits(self.model(images))
        return logits, caught[0]

    def _teacher(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with unpatched(self.patch):
            return self._forward(images)

    def _distilled(self, logits: Tensor, tokens: Tensor | None, given: Tensor, others: Tensor | None) -> Tensor:
        loss = self.distill.logits * logits_divergence(logits, given)
        if tokens is not None and others is not None:
            assert self.patch.lesson is not None
            prefix, alive = self.patch.num_prefix_tokens, self.patch.lesson.alive
            compared = token_error(tokens[:, prefix:], others[:, prefix:], alive[max(alive)])
            loss = loss + self.distill.tokens * compared
        return loss

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
