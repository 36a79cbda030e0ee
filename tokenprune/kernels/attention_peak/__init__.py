"""What a token receives from the head that pays it most, summed over queries, without the full attention map.

One opaque operator, so that torch.compile sees a single node.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.attention_peak import eager
from tokenprune.kernels.inputs import at_once, exporting, observed, precision, without_autocast

__all__ = ["attention_peak"]


def attention_peak(
    q: Tensor,
    k: Tensor,
    *,
    first: int = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    memory_limit: int | None = None,
) -> Tensor:
    """sum over i >= first of max_h A_h[i, j] with A_h = softmax(q_h k_hᵀ scale + bias): [B, N].

    q, k: [B, H, N, D]. first: the query at which to begin, behind prefix tokens. scale: D**-0.5 by default. bias:
    [1|B, 1|H, 1|N, N], added to the logits, or a mask of that shape (True: may be attended to). memory_limit: bytes of
    one head's map to hold at a time (64 MiB, on a GPU 512 MiB); at least one row's, and rather what fits the cache.
    Returns float32, float64 for float64 inputs. No gradient: a score only chooses tokens. Pruning One More Token
    (Eliopoulos et al., WACV 2025).

    Raises:
        TokenPruneError: shapes that do not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    if exporting():
        rows, keys = q[:, :, first:].to(precision(q)), k.to(precision(q))
        return eager.largest(rows, keys, scale, eager.behind(bias, first)).sum(1)
    run = _attention_peak if observed(q, k) else _run
    found: Tensor = run(q, k, first, scale, bias, at_once(q.device, memory_limit))
    return found


def _run(q: Tensor, k: Tensor, first: int, scale: float, bias: Tensor | None, memory_limit: int) -> Tensor:
    if q.ndim != 4 or k.shape != q.shape or not 0 <= first < q.shape[2]:
        raise TokenPruneError(
            f"attention_peak: q {list(q.shape)}, k {list(k.shape)} and first={first} do not fit; both are [B, H, N, D],"
            " and first is a token of N"
        )
    with without_autocast(q):
        return eager.attention_peak(q, k, first, scale, bias, memory_limit)


_attention_peak = torch.library.custom_op("tokenprune::attention_peak", _run, mutates_args=())


@_attention_peak.register_fake
def _(q: Tensor, k: Tensor, first: int, scale: float, bias: Tensor | None, memory_limit: int) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[2], dtype=precision(q))


@register_flop_formula(torch.ops.tokenprune.attention_peak)
def _flops(q: tuple[int, ...], k: tuple[int, ...], first: int, *args: object, **kwargs: object) -> int:
    batch, heads, rows, dim = q
    return 2 * batch * heads * (rows - first) * k[2] * dim
