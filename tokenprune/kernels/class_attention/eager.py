"""Class attention in plain torch, O(N d)."""

from torch import Tensor


def class_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of the first token: softmax(q₀ kᵀ scale + bias₀), [B, H, N] in float32.

    q, k: [B, H, N, D]; bias: [B or 1, H or 1, N or 1, N] or None.
    """
    logits = (q[:, :, :1].float() * scale) @ k.float().transpose(-2, -1)
    if bias is not None:
        logits = logits + bias[:, :, :1]
    return logits.softmax(-1).squeeze(2)
