"""A few rows of attention, such as what the class token pays every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.errors import TokenPruneError
from tokenprune.kernels.backends import Choice, forced, log_once
from tokenprune.kernels.class_attention.eager import few_logits
from tokenprune.kernels.inputs import (
    additive,
    exporting,
    observed,
    precision,
    repeat_heads,
    transformed,
    without_autocast,
)

__all__ = ["choose", "class_attention"]


def class_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rows: int | slice = 0,
    backend: str | None = None,
) -> Tensor:
    """Rows of softmax(q kᵀ scale + bias), differentiable: [B, H, N] for one row, [B, H, R, N] for a slice of R.

    q: [B, H, M, D]; k: [B, H, N, D], or fewer heads that groups of queries share. scale: D**-0.5 by default. bias:
    [1|B, 1|H, 1|M, N], added to the logits, or a mask of that shape (True: may be attended to). rows: of q, such as 0
    for the class token and -1 for the last text token. backend: "eager" or "triton"; by default `choose` decides.

    Returns float32, float64 for float64 inputs. EViT's equation 3 (Liang et al., 2022) is the mean over heads.

    Raises:
        TokenPruneError: shapes that do not fit, or a backend that cannot take them.
    """
    if isinstance(rows, int) and not -q.shape[2] <= rows < q.shape[2]:
        raise TokenPruneError(f"class_attention: row {rows} of {q.shape[2]}")
    part = rows if isinstance(rows, slice) else slice(rows, rows + 1 or None)
    few, k = q[:, :, part], repeat_heads(k, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if exporting() or transformed():
        logits = few.to(precision(q)) @ k.to(precision(q)).transpose(2, 3) * scale
    else:
        run = _few_logits if observed(few, k) else _run
        logits = run(few, k, scale, backend or "")
    if bias is not None:
        logits = logits + additive(bias if bias.shape[2] == 1 else bias[:, :, part])
    attention = logits.softmax(-1)
    return attention if isinstance(rows, slice) else attention.squeeze(2)


def choose(q: Tensor, k: Tensor, *, backend: str = "") -> Choice:
    """Which implementation computes the logits, and why. Measurements: docs/kernels.md.

    Raises:
        TokenPruneError: `backend` or `use_backend` asks for what cannot be had.
    """
    choice = forced(backend, q, k)
    return choice or Choice("eager", "a product with few rows reads the keys once, whatever computes it")


def _run(q: Tensor, k: Tensor, scale: float, backend: str) -> Tensor:
    if k.shape != (*q.shape[:2], k.shape[2], q.shape[3]):
        raise TokenPruneError(
            f"class_attention: q {list(q.shape)} and k {list(k.shape)} do not fit; they are [B, H, R, D], [B, H, N, D]"
        )
    choice = choose(q, k, backend=backend)
    log_once("class_attention", choice)
    if choice.backend == "triton":
        from tokenprune.kernels.class_attention import triton

        return triton.few_logits(q, k, scale)
    with without_autocast(q):
        return few_logits(q, k, scale)


_few_logits = torch.library.custom_op("tokenprune::few_logits", _run, mutates_args=())


@_few_logits.register_fake
def _(q: Tensor, k: Tensor, scale: float, backend: str) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=precision(q))


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, float, str], output: Tensor) -> None:
    q, k, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    q, k = ctx.saved_tensors
    grad = grad * ctx.scale
    return (grad @ k.to(grad.dtype)).to(q.dtype), (grad.transpose(2, 3) @ q.to(grad.dtype)).to(k.dtype), None, None


_few_logits.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.tokenprune.few_logits)
def _flops(q: tuple[int, ...], k: tuple[int, ...], *args: object, **kwargs: object) -> int:
    batch, heads, rows, dim = q
    return 2 * batch * heads * rows * k[2] * dim
