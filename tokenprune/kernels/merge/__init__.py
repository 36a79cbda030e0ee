"""Tokens picked, merged and given back by index: what `Reduction` and the restoration of a full grid run on.

Without Triton these are torch's own operations, which a compiler fuses with what is around them; so is every compiled
gather. A Triton path is one opaque operator, with a backward of its own.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.backends import Choice, forced, log_once, triton_on_gpu
from tokenprune.kernels.inputs import exporting, observed
from tokenprune.kernels.merge import eager
from tokenprune.kernels.merge.eager import merge_sizes, source

__all__ = ["choose_gather", "choose_merge", "gather", "merge", "merge_sizes", "source", "unmerge"]


@overload
def gather(tokens: Tensor, index: Tensor, *, dim: int = 1, backend: str | None = None) -> Tensor: ...
@overload
def gather(
    tokens: tuple[Tensor, ...], index: Tensor, *, dim: int = 1, backend: str | None = None
) -> tuple[Tensor, ...]: ...
def gather(
    tokens: Tensor | tuple[Tensor, ...], index: Tensor, *, dim: int = 1, backend: str | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Each image's own choice of its tokens, from one per-token tensor or from several at once.

    tokens: [B, ..., N, ...] with N at `dim`, or [1, ..., N, ...] for a table that the images share. index: [B, K], may
    repeat. backend: "eager" or "triton"; by default `choose_gather` decides. Returns [B, ..., K, ...]; differentiable.

    Raises:
        TokenPruneError: shapes that do not fit, or a backend that cannot take them.
    """
    if isinstance(tokens, tuple):
        return tuple(gather(x, index, dim=dim, backend=backend) for x in tokens)
    if index.ndim != 2 or not 1 <= dim < tokens.ndim or (tokens.shape[0] != 1 and tokens.shape[0] != index.shape[0]):
        raise TokenPruneError(
            f"gather: tokens {list(tokens.shape)} and index {list(index.shape)} do not fit along dimension {dim}; they"
            " are [B, ..., N, ...] and [B, K]"
        )
    if not torch.compiler.is_compiling():
        choice = choose_gather(tokens, backend=backend or "")
        log_once("gather", choice)
        if choice.backend == "triton":
            run = _gather if observed(tokens) else _run_gather
            return run(tokens, index, dim)
    return eager.gather(tokens, index, dim)


def merge(
    x: Tensor,
    kept: Tensor,
    moved: Tensor,
    target: Tensor,
    sizes: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge tokens into others: averages weighted by size (ToMe, Bolya et al., 2023, section 3), in order.

    x: [B, n, C]. kept: [B, K] positions that stay, moved: [B, M] positions that are merged, target: [B, M] the position
    among the K kept ones that takes each. sizes: [B, n] original tokens in each, floating-point, None for one each.
    backend: "eager" or "triton"; by default `choose_merge` decides.

    Returns the tokens [B, K, C] in the dtype of x and their sizes [B, K]; differentiable. Averages are taken in float32
    at least, as the sizes are: bfloat16 counts to 256.

    Raises:
        TokenPruneError: shapes that do not fit, or a backend that cannot take them.
    """
    _check(x.shape[0], kept, moved, target)
    compiling = torch.compiler.is_compiling()
    if exporting() or (compiling and x.device.type == "cpu"):
        return eager.merge(x, kept, moved, target, sizes)
    if compiling:
        return _merge(x, kept, moved, target, _or_ones(sizes, x), backend or "")  # type: ignore[no-any-return]
    choice = choose_merge(x, x if sizes is None else sizes, backend=backend or "")
    log_once("merge", choice)
    if choice.backend == "triton":
        sizes = _or_ones(sizes, x)
        run = _merge if observed(x, sizes) else _run_merge
        return run(x, kept, moved, target, sizes, "triton")
    return eager.merge(x, kept, moved, target, sizes)


def unmerge(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    """The inverse of `merge`, with its indices: to each of the n = K + M tokens the row of x [B, K, C] that it is in.

    Returns [B, n, C]; differentiable. Every token of the n is kept or moved; a dropped one is in no row.

    Raises:
        TokenPruneError: as `merge`.
    """
    _check(x.shape[0], kept, moved, target)
    return gather(x, source(kept, moved, target, kept.shape[1] + moved.shape[1]), backend=backend)


def choose_gather(x: Tensor, *, backend: str = "") -> Choice:
    """Which implementation gathers, and why. Measurements: docs/kernels.md.

    Raises:
        TokenPruneError: `backend` or `use_backend` asks for what cannot be had.
    """
    return forced(backend, x) or Choice("eager", "index_select copies whole rows, on a GPU too")


def choose_merge(x: Tensor, sizes: Tensor, *, backend: str = "") -> Choice:
    """Which implementation merges, and why. Measurements: docs/kernels.md.

    Raises:
        TokenPruneError: `backend` or `use_backend` asks for what cannot be had.
    """
    choice = forced(backend, x, sizes)
    if choice is None and triton_on_gpu(x, sizes):
        return Choice("triton", "one launch for ten, and sums in a fixed order")
    return choice or Choice("eager", "torch's gather and scatter_add")


def _or_ones(sizes: Tensor | None, x: Tensor) -> Tensor:
    return x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes


def _check(batch: int, kept: Tensor, moved: Tensor, target: Tensor) -> None:
    if kept.shape[0] != batch or moved.shape[0] != batch or moved.shape != target.shape:
        raise TokenPruneError(
            f"merge: kept {list(kept.shape)}, moved {list(moved.shape)} and target {list(target.shape)} do not fit a"
            f" batch of {batch}; they are [B, K], [B, M] and [B, M]"
        )


def _run_gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    from tokenprune.kernels.merge import triton

    return triton.gather(x, index, dim)


_gather = torch.library.custom_op("tokenprune::gather", _run_gather, mutates_args=())


@_gather.register_fake
def _(x: Tensor, index: Tensor, dim: int) -> Tensor:
    return x.new_empty(index.shape[0], *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :])


def _keep_index(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, index, ctx.dim = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    shape = (index.shape[0], *ctx.shape[1:])
    along = index.reshape(index.shape[0], *(1,) * (ctx.dim - 1), -1, *(1,) * (len(shape) - ctx.dim - 1))
    back = grad.new_zeros(shape).scatter_add(ctx.dim, along.expand_as(grad), grad)
    return back.sum_to_size(ctx.shape), None, None


_gather.register_autograd(_gather_backward, setup_context=_keep_index)


def _run_merge(
    x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    choice = choose_merge(x, sizes, backend=backend)
    log_once("merge", choice)
    if choice.backend == "triton":
        from tokenprune.kernels.merge import triton

        return triton.merge(x, kept, moved, target, sizes)
    return eager.merge(x, kept, moved, target, sizes)


_merge = torch.library.custom_op("tokenprune::merge", _run_merge, mutates_args=())


@_merge.register_fake
def _(x: Tensor, kept: Tensor, moved: Tensor, target: Tensor, sizes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(*kept.shape, x.shape[2]), sizes.new_empty(kept.shape)


def _keep_merged(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kept, moved, target, sizes, _ = inputs
    ctx.save_for_backward(x, kept, moved, target, sizes, *output)


def _merge_backward(ctx: Any, grad: Tensor, grad_sizes: Tensor) -> tuple[Tensor | None, ...]:
    """d out[j] / d x[i] = sizes[i] / total[j] and d out[j] / d sizes[i] = (x[i] - out[j]) / total[j] for i in j."""
    x, kept, moved, target, sizes, out, total = ctx.saved_tensors
    place = source(kept, moved, target, x.shape[1])
    gone = (place < 0).unsqueeze(-1)
    place = place.clamp(min=0)
    share = eager.gather(grad / total.unsqueeze(-1), place, 1).masked_fill(gone, 0.0)
    grad_x = (share * sizes.unsqueeze(-1)).to(x.dtype)
    if not ctx.needs_input_grad[4]:
        return grad_x, None, None, None, None, None
    from_values = ((x - eager.gather(out, place, 1)) * share).sum(-1)
    from_sizes = eager.gather(grad_sizes, place, 1).masked_fill(gone.squeeze(-1), 0.0)
    return grad_x, None, None, None, (from_values + from_sizes).to(sizes.dtype), None


_merge.register_autograd(_merge_backward, setup_context=_keep_merged)


# As torch's own gather and scatter_add, which multiply no matrices.
@register_flop_formula([torch.ops.tokenprune.gather, torch.ops.tokenprune.merge])
def _flops(*args: object, **kwargs: object) -> int:
    return 0
