"""SiT: tokens slimmed to learned mixtures (Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, as in Haurum et
al., "Which Tokens to Use?", 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenprune.learning import Learned, Recipe, Shape
from tokenprune.method import Method
from tokenprune.registry import register_method
from tokenprune.schedule import InFrontOfStages
from tokenprune.selection.mixtures import mix, no_penalty

RATE = 1e-3


class Slimming(nn.Module):
    """Weights of each mixture by an MLP over each token, layer-normalised (section 3.1, equation 3)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, width // 2)
        self.mixtures = nn.Linear(width // 2, shape.tokens)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """x [B, n, C] to weights [B, keep, n], of which each row sums to one."""
        x = F.gelu(self.hidden(self.norm(x.to(self.scale.dtype))))
        logits = F.linear(x, self.mixtures.weight[:keep], self.mixtures.bias[:keep])
        return (self.scale * logits).transpose(1, 2).softmax(-1)


def rate(name: str, steps: int) -> float:
    """Peak learning rate: as published for a batch of 1,024."""
    return RATE


LEARNED = Learned(
    part=Slimming,
    penalty=no_penalty,
    rate=rate,
    recipe=Recipe(epochs=30, batch_size=128, opt="adamw", weight_decay=0.05, smoothing=0.1),
    sized=True,
)


@register_method("sit")
def sit(*, rate: float = 0.7, places: tuple[int, ...] | None = None) -> Method:
    """Replace the tokens behind a block by fewer mixtures of all of them, with weights from a small learned MLP.

    `tokenprune train MODEL --method sit --flops 0.6` learns it for that number of tokens while the model's own weights
    stay as they are (as published the model is trained too). rate: share of mixtures at each of `places`, behind the
    blocks in front of a quarter, a half and three quarters of the depth. Where all are kept, nothing is done.
    """
    return Method(
        name="sit",
        paper="Zong et al., Self-slimmed Vision Transformer, ECCV 2022",
        schedule=InFrontOfStages(rate, places),
        select=mix,
        learned=LEARNED,
        position="post",
        merges=True,
    )
