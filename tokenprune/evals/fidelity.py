"""How close a patched model's answers are to the unpatched model's, and to the truth, an image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Observation:
    """What one forward gave: `features` [B, D] that enter the classifier, `logits` [B, classes] that leave it.

    A model whose classifier is not one linear layer has its output as both.
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
        logits = model(images)
    finally:
        if handle is not None:
            handle.remove()
    return Observation(caught[0] if caught else logits, logits)


def agreement(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether the top-1 class of `logits` [B, classes] is that of `reference`: [B], bool; of maps of them
    [B, classes, h, w] the share of places where it is."""
    same = logits.argmax(dim=1) == reference.argmax(dim=1)
    return same if same.ndim == 1 else same.double().flatten(1).mean(1)


def correct(logits: Tensor, labels: Tensor, among: int = 1) -> Tensor:
    """Whether `labels` [B] are among the first classes of `logits` [B, classes]: [B], bool."""
    if among == 1:
        return logits.argmax(dim=1) == labels
    return (logits.topk(among, dim=1).indices == labels[:, None]).any(1)


def _classifier(model: nn.Module) -> nn.Module | None:
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if get_classifier is not None else None
    return classifier if isinstance(classifier, nn.Linear) else None
