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
    flops: the budget. smoothing: of the labels. across: the mean of a tensor over all processes. teacher: the model as
    it was and its last block, None where that is `model` unpatched. progress: the share of the training that is done.
    told: names of what the loss consists of.
    """

    told = ("loss", "added_loss", "kept")

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
        teacher: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        assert patch.learned is not None
        self.model, self.parts = model, patch.learned
        self.patch, self.width, self.flops = patch, width, flops
        self.smoothing, self.distill, self.across, self.progress = smoothing, distill, across, 0.0
        self.last, self.teacher = (last,), teacher  # no submodule twice, and none that is not trained

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [], and of what it consists [3]: that of the task with distillation, what the method adds, and the
        share of the prunable tokens behind the last place. labels: classes [B], or maps of them [B, h, w]."""
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
            strength=learned.curriculum(self.progress, labels.ndim > 1) if learned.curriculum is not None else 1.0,
            labels=labels,
            parts=self.parts,
            grid=patch.grid,
        )
        teacher = self._teacher(images, labels) if self.distill else None
        logits, tokens = self._forward(self.model, self.last[0], images, labels)
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

    def _forward(
        self, model: nn.Module, last: nn.Module, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the tokens behind the last block where they are compared."""
        if not self.distill.tokens:
            return logits_of(model(images), labels), None
        with outputs_of(last) as caught:
            logits = logits_of(model(images), labels)
        return logits, caught[0]

    def _teacher(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.teacher is not None:
            with torch.no_grad():
                return self._forward(*self.teacher, images, labels)
        with unpatched(self.patch):
            return self._forward(self.model, self.last[0], images, labels)

    def _distilled(self, logits: Tensor, tokens: Tensor | None, given: Tensor, others: Tensor | None) -> Tensor:
        each, wanted = (one.movedim(1, -1).flatten(0, -2) for one in (logits, given))  # a row for each label
        loss = self.distill.logits * logits_divergence(each, wanted)
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


def logits_of(output: object, labels: Tensor) -> Tensor:
    """The logits [B, classes] of labels [B], or [B, classes, h, w] of [B, h, w]."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 1 + labels.ndim or logits.shape[2:] != labels.shape[1:]:
        found = "no logits" if not isinstance(logits, Tensor) else f"no logits but {list(logits.shape)}"
        wanted = "[B, classes]" if labels.ndim == 1 else f"[B, classes, {', '.join(map(str, labels.shape[1:]))}]"
        raise TokenPruneError(
            f"the model's output is {found}, and {wanted} is what the labels are compared with: train on a model with a"
            " classifier, or with a head whose maps are of the size of the labels'"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise TokenPruneError(
            f"labels from {int(labels.min())} to {int(labels.max())}, and the model has {logits.shape[1]} classes"
        )
    return logits
