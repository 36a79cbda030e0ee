"""Inputs of the kernel tests, in the layout that a fused projection leaves, and their measure of error."""

import torch
from torch import Tensor

TOKENS = (1, 63, 197, 257, 1025)


def attention_inputs(batch: int, heads: int, tokens: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, N, D] as views of one [B, N, 3, H, D], large enough for sharp attention, and weights
    [B, H, N] that sum to one."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    qkv = 2 * torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    weights = torch.rand(batch, heads, tokens, generator=generator)
    return q, k, weights / weights.sum(-1, keepdim=True)


def rows(batch: int, count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows [B, count, D] that are no multiple of anything apart in memory."""
    generator = torch.Generator().manual_seed(1000 * count + seed)
    return torch.randn(batch, count, dim + 3, generator=generator)[..., :dim]


def error(result: Tensor, exact: Tensor) -> float:
    """Euclidean distance over the exact result's length."""
    return float((result.double() - exact).norm() / exact.norm())


def groups(batch: int, tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, n, C] behind a class token, sizes [B, n] of 1 to 9, and kept, moved, target: a third of the tokens moves,
    several into one."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    x = torch.randn(batch, tokens + 1, channels, generator=generator)[:, 1:]
    sizes = torch.randint(1, 10, (batch, tokens), generator=generator).float()
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    moved, kept = order[:, : tokens // 3], order[:, tokens // 3 :]
    target = torch.randint(0, max(1, tokens // 3), moved.shape, generator=generator)
    return x, sizes, kept, moved, target
