"""Row-wise best match by cosine similarity, without the matrix of similarities.

One opaque operator, so that torch.compile sees a single node, whatever the batch and the path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.backends import Choice, forced, log_once, triton_on_gpu
from tokenprune.kernels.inputs import at_once, exporting, observed, precision, without_autocast
from tokenprune.kernels.matching import eager

__all__ = ["choose", "cosine_match"]


def cosine_match(
    a: Tensor,
    b: Tensor,
    *,
    window: int | None = None,
    memory_limit: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Best match of each row of a among the rows of b by cosine similarity, ties to the lower row.

    a: [B, M, D], b: [B, N, D] with N > 0. window: row i looks only at the rows of b at most `window` away from its own
    place, floor(i N / M); the rows of a grid's windows go into the batch instead. memory_limit: bytes of similarities
    to hold at a time (64 MiB, on a GPU 512 MiB); at least one row's, and rather what fits the cache. backend: "eager"
    or "triton"; by default `choose` decides.

    Returns the similarity [B, M] in float32 (float64 for float64 inputs) and the row [B, M]. No gradient: a match only
    chooses tokens. A row of zeros has similarity 0; NaN gives NaN and a valid row. Used by ToMe (Bolya et al., 2023,
    section 3), Zero-TPrune's similarity stage and similarity-based recovery.

    Raises:
        TokenPruneError: shapes that do not fit, no rows in b, a negative window, or a backend that cannot take them.
    """
    a, b = a.detach(), b.detach()
    if exporting():
        return _formula(a, b, window)
    run = _cosine_match if observed(a, b) else _run
    value, row = run(a, b, -1 if window is None else window, at_once(a.device, memory_limit), backend or "")
    return value, row


def choose(a: Tensor, b: Tensor, *, memory_limit: int | None = None, backend: str = "") -> Choice:
    """Which implementation these inputs take and why. Measurements: docs/kernels.md.

    Raises:
        TokenPruneError: `backend` or `use_backend` asks for what cannot be had.
    """
    choice = forced(backend, a, b)
    if choice is not None:
        return choice
    size = a.shape[0] * a.shape[1] * b.shape[1] * precision(a).itemsize
    if size > at_once(a.device, memory_limit) and triton_on_gpu(a, b):
        return Choice("triton", "the similarities exceed the memory limit")
    return Choice("eager", "torch's product and reductions on blocks of rows")


def _formula(a: Tensor, b: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    dtype = precision(a)
    similarity = torch.bmm(F.normalize(a.to(dtype), dim=-1), F.normalize(b.to(dtype), dim=-1).transpose(1, 2))
    if window is not None:
        columns = torch.arange(b.shape[1], device=a.device)
        outside = eager.outside(0, a.shape[1], columns, a.shape[1], b.shape[1], window)
        similarity = similarity.masked_fill(outside, float("-inf"))
    value, row = similarity.max(dim=-1)
    return value, row


def _run(a: Tensor, b: Tensor, window: int, memory_limit: int, backend: str) -> tuple[Tensor, Tensor]:
    if a.ndim != 3 or b.shape != (a.shape[0], b.shape[1], a.shape[2]) or b.shape[1] == 0:
        raise TokenPruneError(
            f"cosine_match: a {list(a.shape)} and b {list(b.shape)} do not fit; they are [B, M, D] and [B, N, D], N > 0"
        )
    if window < -1:
        raise TokenPruneError(f"cosine_match: window={window}; it is a number of rows, 0 or more")
    choice = choose(a, b, memory_limit=memory_limit, backend=backend)
    log_once("cosine_match", choice)
    if choice.backend == "triton":
        from tokenprune.kernels.matching import triton

        return triton.cosine_match(a, b, window)
    with without_autocast(a):
        return eager.cosine_match(a, b, None if window < 0 else window, memory_limit)


_cosine_match = torch.library.custom_op("tokenprune::cosine_match", _run, mutates_args=())


@_cosine_match.register_fake
def _(a: Tensor, b: Tensor, window: int, memory_limit: int, backend: str) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=precision(a)), a.new_empty(a.shape[:2], dtype=torch.long)


@register_flop_formula(torch.ops.tokenprune.cosine_match)
def _flops(a: tuple[int, ...], b: tuple[int, ...], window: int, *args: object, **kwargs: object) -> int:
    batch, rows, dim = a
    return 2 * batch * rows * dim * (b[1] if window < 0 else min(b[1], 2 * window + 1))
