"""Mass that tokens receive through attention, without the full attention map.

One opaque operator, so that torch.compile and torch.export see a single node, whatever the batch and the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.attention_mass import eager, formula
from tokenprune.kernels.backends import Choice, forced, log_once, triton_on_gpu
from tokenprune.kernels.inputs import at_once, observed, precision, repeat_heads, without_autocast

__all__ = ["attention_mass", "choose", "mass_and_log_sums"]

MAX_ITERATIONS = 200

# Bytes of one head's map (1,448 tokens) up to which one iteration, too, is faster with the map at once: some rows after
# the other take 1.3 to 1.06 of the time of torch's own product at 640 to 1,280 tokens on an AMD EPYC, half at 2,048.
ONE_PASS = 8 * 2**20


def attention_mass(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    iterations: int | float | Sequence[int] = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    memory_limit: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Push weights through the attention graph: `iterations` times w <- Aᵀ w with A = softmax(q kᵀ scale + bias).

    q: [B, H, M, D]; k: [B, H, N, D], or fewer heads that groups of queries share; weights: [B, H, M]; scale: D**-0.5
    by default. bias: [1|B, 1|H, 1|M, N], added to the logits, or a mask of that shape (True: may be attended to), as
    in scaled_dot_product_attention; a query that may attend to nothing pays nothing. Weights of padded queries must be
    0. M may differ from N (a subset of the queries) for one iteration.

    iterations: how often; or a float, the L1 change of a head's mass below which it has settled (at most 200
    iterations, and the host waits for the device after each); or several rising counts, for the mass after each of
    them.

    Returns [B, H, N], or [len(iterations), B, H, N] for several counts, in float32 (float64 for float64 inputs). As
    rows of A sum to one, the sum of the weights stays. No gradient: scores only choose tokens.

    memory_limit: bytes of A to hold at a time (64 MiB, on a GPU 512 MiB), where holding it pays; at least one pair's,
    and rather what fits the cache. backend: "tiled", "matrix_free", "eager" (either of these) or "triton"; by default
    `choose` decides.

    The step of weighted PageRank (Zero-TPrune, Wang et al., 2024, section 3.2).

    Raises:
        TokenPruneError: shapes that do not fit, a backend that cannot take them, no iterations.
    """
    mass = _found(q, k, weights, iterations, scale, bias, memory_limit, backend, log_sums=False)[0]
    return mass if isinstance(iterations, Sequence) else mass[0]


def mass_and_log_sums(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    *,
    iterations: int | float | Sequence[int] = 1,
    scale: float | None = None,
    bias: Tensor | None = None,
    memory_limit: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_mass`, and the log-sum-exp [B, H, M] of each row of logits (infinite where a query may attend to
    nothing), with which single entries of A can be had later without the others of their row."""
    mass, log_sums = _found(q, k, weights, iterations, scale, bias, memory_limit, backend, log_sums=True)
    return mass if isinstance(iterations, Sequence) else mass[0], log_sums


def _found(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    iterations: int | float | Sequence[int],
    scale: float | None,
    bias: Tensor | None,
    memory_limit: int | None,
    backend: str | None,
    *,
    log_sums: bool,
) -> tuple[Tensor, Tensor]:
    if isinstance(iterations, float) and not iterations > 0:
        raise TokenPruneError(f"attention_mass: iterations={iterations}: a tolerance is above 0, a count is an integer")
    tolerance = iterations if isinstance(iterations, float) else 0.0
    if isinstance(iterations, float):
        counts = [MAX_ITERATIONS]
    else:
        counts = list(iterations) if isinstance(iterations, Sequence) else [iterations]
    q, k = q.detach(), k.detach()
    if torch.onnx.is_in_onnx_export():
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        keys = repeat_heads(k, q.shape[1])
        return formula.attention_mass(q, keys, weights, bias, counts, tolerance, scale)
    operator = _attention_mass if observed(q, k) else _run
    found: tuple[Tensor, Tensor] = operator(
        q,
        repeat_heads(k, q.shape[1]),
        weights.detach(),
        None if bias is None else bias.detach(),
        counts,
        tolerance,
        q.shape[-1] ** -0.5 if scale is None else scale,
        at_once(q.device, memory_limit),
        backend or "",
        log_sums,
    )
    return found


def choose(q: Tensor, k: Tensor, *, iterations: int = 1, memory_limit: int | None = None, backend: str = "") -> Choice:
    """Which path these inputs take and why; `iterations` is the largest count. Measurements: docs/kernels.md.

    Raises:
        TokenPruneError: `backend` or `use_backend` asks for what cannot be had.
    """
    choice = forced(backend, q, k, names=("tiled", "matrix_free", "eager", "triton"))
    if choice is not None and choice.backend != "eager":
        return choice
    limit, itemsize = at_once(q.device, memory_limit), precision(q).itemsize
    if choice is None and triton_on_gpu(q, k):
        if _fits(2 * q.shape[0] * q.shape[1] * q.shape[2], k.shape[2], limit, itemsize):  # the logits and A
            return Choice("tiled", "a few calls of torch take less time than the launch of a kernel of our own")
        return Choice("triton", "a GPU computes A faster than it writes it to memory")
    if iterations == 1 and not _fits(q.shape[2], k.shape[2], min(limit, ONE_PASS), itemsize):
        return Choice("matrix_free", "one iteration reads every row of A once")
    if _fits(q.shape[2], k.shape[2], limit, itemsize):
        return Choice("tiled", "A is computed once for all iterations")
    return Choice("matrix_free", "one head's A exceeds the memory limit")


def _fits(rows: int, keys: int, memory_limit: int, itemsize: int = 4) -> bool:
    return rows * keys * itemsize <= memory_limit


def _run(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    memory_limit: int,
    backend: str,
    log_sums: bool,
) -> tuple[Tensor, Tensor]:
    """The mass, and the log-sum-exp of each row, which is empty where it is not wanted."""
    _check(q, k, weights, bias, counts)
    choice = choose(q, k, iterations=counts[-1], memory_limit=memory_limit, backend=backend)
    log_once("attention_mass", choice)
    sums = q.new_empty(q.shape[:3] if log_sums else 0, dtype=precision(q))
    wanted = sums if log_sums else None
    if 0 in (*q.shape[:3], k.shape[2]):  # nobody pays, or nobody is paid
        return q.new_zeros(len(counts), *q.shape[:2], k.shape[2], dtype=sums.dtype), sums.fill_(float("inf"))
    with without_autocast(q):
        if choice.backend == "triton":
            from tokenprune.kernels.attention_mass import triton

            return triton.attention_mass(q, k, weights, bias, counts, tolerance, scale, wanted), sums
        run = eager.tiled if choice.backend == "tiled" else eager.matrix_free
        return run(q, k, weights, bias, counts, tolerance, scale, memory_limit, wanted), sums


def _check(q: Tensor, k: Tensor, weights: Tensor, bias: Tensor | None, counts: Sequence[int]) -> None:
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    if k.shape != (batch, heads, keys, dim) or weights.shape != (batch, heads, rows):
        raise TokenPruneError(
            f"attention_mass: q {list(q.shape)}, k {list(k.shape)} and weights {list(weights.shape)} do not fit; they"
            " are [B, H, M, D], [B, H, N, D] and [B, H, M]"
        )
    if bias is not None and (
        bias.ndim != 4
        or bias.shape[3] != keys
        or any(given not in (1, full) for given, full in zip(bias.shape, (batch, heads, rows), strict=False))
    ):
        raise TokenPruneError(
            f"attention_mass: a bias {list(bias.shape)} does not fit logits {[batch, heads, rows, keys]}"
        )
    if not counts or min(counts) < 1 or list(counts) != sorted(set(counts)):
        raise TokenPruneError(f"attention_mass: iterations={list(counts)}: at least one, in rising order")
    if counts[-1] > 1 and rows != keys:
        raise TokenPruneError(
            f"attention_mass: {counts[-1]} iterations need a query for every key, not {rows} for {keys}; use one"
        )


_attention_mass = torch.library.custom_op("tokenprune::attention_mass", _run, mutates_args=())


@_attention_mass.register_fake
def _(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    memory_limit: int,
    backend: str,
    log_sums: bool,
) -> tuple[Tensor, Tensor]:
    mass = q.new_empty(len(counts), q.shape[0], q.shape[1], k.shape[2], dtype=precision(q))
    return mass, q.new_empty(q.shape[:3] if log_sums else 0, dtype=precision(q))


@register_flop_formula(torch.ops.tokenprune.attention_mass)
def _flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    weights: tuple[int, ...],
    bias: tuple[int, ...] | None,
    counts: Sequence[int],
    tolerance: float,
    scale: float,
    memory_limit: int,
    *args: object,
    **kwargs: object,
) -> int:
    batch, heads, rows, dim = q
    keys, pushes = k[2], counts[-1]
    maps = 1 if _fits(rows, keys, memory_limit) else pushes
    return 2 * batch * heads * rows * keys * (maps * dim + pushes)
