"""How close a patched model's answers are to the unpatched model's, and to the truth, an image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Observation:
    """What one forward gave: `features` [B, D] that enter the classifier, `logits` [B, classes] that leave it.

    A model without a single classifier layer has its output as both.
    """

    features: Tensor
    logits: Tensor


def observe(model: nn.Module, images: Tensor) -> Observation:
    """One forward of `images` [B, C, H, W]; the features are caught on their way into `model.get_classifier()`."""
    classifier = _classifier(model)
    caught: list[Tensor] = []

    def catch(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        caught.append(inputs[0])

    handle = None if classifier is None else classifier.register_forward_pre_hook(catch)
    try:
        with torch.inference_mode():
            logits = model(images)
    finally:
        if handle is not None:
            handle.remove()
    return Observation(caught[0] if caught else logits, logits)


def agreement(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether the top-1 class of `logits` [B, classes] is that of `reference`: [B], bool."""
    return logits.argmax(dim=1) == reference.argmax(dim=1)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the top-1 class of `logits` [B, classes] is `labels` [B]: [B], bool."""
    return logits.argmax(dim=1) == labels


def knn_correct(features: Tensor, labels: Tensor, neighbours: int = 10) -> Tensor:
    """Leave-one-out k-nearest-neighbour classification by cosine, for models without a classifier: [N], bool.

    features [N, D] are both gallery and query, no image being its own neighbour; labels [N] are class numbers. Votes
    are weighted by exp(cosine / 0.07) as in DINO (Caron et al., arXiv 2104.14294, appendix F.1).
    """
    unit = functional.normalize(features.float(), dim=1)
    classes = int(labels.max()) + 1
    found = []
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        own = torch.arange(start, start + len(similarity), device=unit.device)
        similarity[torch.arange(len(similarity), device=unit.device), own] = -torch.inf
        nearest = similarity.topk(min(neighbours, len(unit) - 1), dim=1)
        votes = similarity.new_zeros(len(similarity), classes)
        votes.scatter_add_(1, labels[nearest.indices], ((nearest.values - 1.0) / 0.07).exp())
        found.append(votes.argmax(dim=1) == labels[own])
    return torch.cat(found)


def _classifier(model: nn.Module) -> nn.Module | None:
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier is not None else None
    return classifier if isinstance(classifier, nn.Linear) else None
