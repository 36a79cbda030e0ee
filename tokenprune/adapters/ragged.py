"""What modules of several libraries do on batches whose images keep different numbers of tokens."""

from __future__ import annotations

from torch import Tensor

from tokenprune.adapters.swapping import Mixin
from tokenprune.ragged_attention import each_image_here


class RaggedDropPath(Mixin):
    """Stochastic depth that draws once for each image."""

    def forward(self, x: Tensor) -> Tensor:
        return each_image_here(super().forward, x)
