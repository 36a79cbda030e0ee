"""diffusers' attention backends: which one a copy takes that is only counted."""

from __future__ import annotations

import copy

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn


def count_natively(model: nn.Module) -> None:
    """Let the attentions of `model`, a copy on the meta device, run torch's own: others want real tensors, and torch's
    counters do not know them."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            own = copy.copy(processor)
            own._attention_backend = AttentionBackendName.NATIVE  # type: ignore[union-attr]
            module.processor = own  # type: ignore[assignment]
