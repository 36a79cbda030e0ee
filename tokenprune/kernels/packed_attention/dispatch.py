"""Which backend runs an attention over a ragged batch, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.backends import Choice, log_once
from tokenprune.kernels.packed_attention import eager, fused

FUSED = {
    "varlen": fused.varlen,
    "block_diagonal": fused.block_diagonal,
    "nested": fused.nested,
    "flex": fused.flex,
}
BACKENDS = ("per_length", *FUSED)


def choose_backend(q: Tensor, v: Tensor, *, key_bias: bool = False, dropout: float = 0.0) -> Choice:
    """The backend for q [T, H, D] and v [T, H, Dv] on this device.

    What `torch.nn.attention.sdpa_kernel` forbids is not used. "flex" is never chosen by itself: it multiplies the
    values of other images by zero, which lets their NaN through, and it compiles at its first call.
    """
    if not q.is_cuda:
        return Choice("per_length", f"no kernel for ragged batches runs on a {q.device.type}")
    size = max(q.shape[-1] + (2 if key_bias else 0), v.shape[-1])
    half = q.dtype in (torch.float16, torch.bfloat16)
    single = half or q.dtype == torch.float32
    equal = key_bias or q.shape[-1] == v.shape[-1]  # folding a bias makes them equal
    aligned = key_bias or size % 8 == 0
    if _allowed("flash") and half and equal and aligned and size <= 256 and _has_varlen(q, dropout):
        return Choice("varlen", "flash attention over cumulative lengths")
    if _allowed("mem_efficient") and single and aligned and _has_block_diagonal():
        return Choice("block_diagonal", "xformers is installed")
    if _allowed("mem_efficient") and single and equal and aligned:
        return Choice("nested", "the memory-efficient kernel over nested tensors")
    return Choice(
        "per_length", "no kernel for ragged batches takes this input under the attention backends that are allowed"
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    lengths: Sequence[int] | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(q kᵀ scale + key_bias) v within each image of a ragged batch, whose images lie one behind another.

    q, k: [T, H, D]; v: [T, H, Dv]; cu_seqlens: int32 [B + 1], image i is rows cu_seqlens[i] to cu_seqlens[i + 1].
    lengths: the B lengths on the host, which saves a synchronisation. key_bias: [T], added to the logits of a key
    (proportional attention). scale: D**-0.5 by default. dropout: of the attention weights. backend: one of BACKENDS,
    None for the one of `choose_backend`. Returns [T, H, Dv]; differentiable.

    Images of equal length that lie side by side cost "per_length" one call.

    Raises:
        TokenPruneError: lengths that do not sum to T, or a backend that is none of BACKENDS.
    """
    if lengths is None:
        lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0]:
        raise TokenPruneError(f"packed_attention: images of {sum(lengths)} tokens in all, and {q.shape[0]} rows")
    if backend is not None and backend not in BACKENDS:
        raise TokenPruneError(f"packed_attention: backend {backend!r}: use one of {', '.join(map(repr, BACKENDS))}")
    if q.is_cuda and torch.is_autocast_enabled("cuda"):  # as scaled_dot_product_attention does by itself
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend is None:
        choice = choose_backend(q, v, key_bias=key_bias is not None, dropout=dropout)
        log_once("packed_attention", choice)
        backend = choice.backend
    filled = [length for length in lengths if length]
    if backend == "per_length" or not filled:
        return eager.per_length(q, k, v, filled, key_bias, scale, dropout)
    if backend == "flex" and dropout:
        raise ValueError("FlexAttention has no dropout; use another backend or none")
    if key_bias is None:
        return FUSED[backend](q, k, v, filled, scale, dropout)
    q, k, padded = fused.fold_bias(q, k, v, key_bias, scale)
    return FUSED[backend](q, k, padded, filled, scale, dropout)[..., : v.shape[-1]]


def _allowed(kernel: str) -> bool:
    return bool(getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")())


def _has_varlen(q: Tensor, dropout: float) -> bool:
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return False
    torchs = fused.optional("torch.nn.attention.varlen", "varlen_attn")
    return (torchs is not None and dropout == 0.0) or fused.optional("flash_attn", "flash_attn_varlen_func") is not None


def _has_block_diagonal() -> bool:
    """Whether xformers is there with kernels that load (its Python part imports without them)."""
    loaded = fused.optional("xformers", "_has_cpp_library")
    return bool(loaded) and fused.optional("xformers.ops", "memory_efficient_attention") is not None
