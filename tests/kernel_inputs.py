"""Inputs of the kernel tests, in the layout that a fused projection leaves, and their measure of error."""

import os

import torch
from torch import Tensor

TOKENS = (1, 63, 197, 257, 1025)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Where Triton runs: on a CPU only in its interpreter.
TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def attention_inputs(
    batch: int, heads: int, tokens: int, dim: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, N, D] as views of one [B, N, 3, H, D], large enough for sharp attention, and weights
    [B, H, N] that sum to one."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    qkv = 2 * torch.randn(batch, tokens, 3, heads, dim, generator=generator)
    q, k, _ = qkv.to(device).permute(2, 0, 3, 1, 4)
    weights = torch.rand(batch, heads, tokens, generator=generator).to(device)
    return q, k, weights / weights.sum(-1, keepdim=True)


def rows(batch: int, count: int, dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Rows [B, count, D] that are no multiple of anything apart in memory."""
    generator = torch.Generator().manual_seed(1000 * count + seed)
    return torch.randn(batch, count, dim + 3, generator=generator).to(device)[..., :dim]


def error(result: Tensor, exact: Tensor) -> float:
    """Euclidean distance over the exact result's length."""
    return float((result.double() - exact).norm() / exact.norm())


def groups(
    batch: int, tokens: int, channels: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [B, n, C] behind a class token, sizes [B, n] of 1 to 9, and kept, moved, target: a third of the tokens moves,
    several into one."""
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    x = torch.randn(batch, tokens + 1, channels, generator=generator).to(device)[:, 1:]
    sizes = torch.randint(1, 10, (batch, tokens), generator=generator).float()
    order = torch.rand(batch, tokens, generator=generator).argsort(1)
    moved, kept = order[:, : tokens // 3], order[:, tokens // 3 :]
    target = torch.randint(0, max(1, tokens // 3), moved.shape, generator=generator)
    sizes, kept, moved, target = (part.to(device) for part in (sizes, kept, moved, target))
    return x, sizes, kept, moved, target
