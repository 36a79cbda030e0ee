"""What the attention operations do to their inputs alike."""

import torch
from torch import Tensor

# An exported program is to run without this package, so small operations are traced as torch's own there. Before
# torch 2.7 exporting looks like compiling.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

EPSILON = 1e-12  # the smallest norm to divide by, as in torch's normalize


def repeat_heads(k: Tensor, heads: int) -> Tensor:
    """Keys [B, H / g, N, D] of grouped queries, each head g times: [B, H, N, D]."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], dim=1)


def additive(bias: Tensor) -> Tensor:
    """A mask (True: may be attended to) as a bias of 0 and -inf; a bias as it is."""
    if bias.dtype != torch.bool:
        return bias
    return torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, float("-inf"))


def precision(q: Tensor) -> torch.dtype:
    """Scores are computed and returned in float32, in float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
