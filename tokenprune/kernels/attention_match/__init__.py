"""Which of some tokens each query attends to most, in the mean over heads, without the full attention map.

One opaque operator, so that torch.compile sees a single node.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.attention_match import eager
from tokenprune.kernels.inputs import at_once, observed, without_autocast

__all__ = ["attention_match"]


def attention_match(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    *,
    scale: float | None = None,
    log_sums: Tensor | None = None,
    memory_limit: int | None = None,
) -> Tensor:
    """argmax over j of mean_h A_h[i, columns[j]] with A_h = softmax(q_h k_hᵀ scale) over all N keys, [B, M] in [0, K).

    q: [B, H, M, D]; k: [B, H, N, D]; columns: [B, K], no column twice. scale: D**-0.5 by default. log_sums: [B, H, M],
    the log-sum-exp of each row of logits where `mass_and_log_sums` has found it; only the columns' logits are computed
    then. memory_limit: bytes of the map to hold at a time (64 MiB, on a GPU 512 MiB); at least one row's, and rather
    what fits the cache. No gradient: a match only chooses tokens. AT-EDM's similarity-based recovery (Wang et al., CVPR
    2024, section 3.3).

    Raises:
        TokenPruneError: shapes that do not fit, or no columns.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    run = _attention_match if observed(q, k) else _run
    found: Tensor = run(q, k, columns, scale, log_sums, at_once(q.device, memory_limit))
    return found


def _run(q: Tensor, k: Tensor, columns: Tensor, scale: float, log_sums: Tensor | None, memory_limit: int) -> Tensor:
    batch, heads, _, dim = q.shape
    if k.shape != (batch, heads, k.shape[2], dim) or columns.ndim != 2 or columns.shape[0] != batch:
        raise TokenPruneError(
            f"attention_match: q {list(q.shape)}, k {list(k.shape)} and columns {list(columns.shape)} do not fit; they"
            " are [B, H, M, D], [B, H, N, D] and [B, K]"
        )
    if not 0 < columns.shape[1] <= k.shape[2]:
        raise TokenPruneError(f"attention_match: {columns.shape[1]} columns of {k.shape[2]} keys")
    with without_autocast(q):
        return eager.attention_match(q, k, columns, scale, log_sums, memory_limit)


_attention_match = torch.library.custom_op("tokenprune::attention_match", _run, mutates_args=())


@_attention_match.register_fake
def _(q: Tensor, k: Tensor, columns: Tensor, scale: float, log_sums: Tensor | None, memory_limit: int) -> Tensor:
    return torch.empty(q.shape[0], q.shape[2], dtype=torch.long, device=q.device)


@register_flop_formula(torch.ops.tokenprune.attention_match)
def _flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    columns: tuple[int, ...],
    scale: float,
    log_sums: tuple[int, ...] | None,
    *args: object,
    **kwargs: object,
) -> int:
    batch, heads, rows, dim = q
    return 2 * batch * heads * rows * (k[2] if log_sums is None else columns[1]) * dim
