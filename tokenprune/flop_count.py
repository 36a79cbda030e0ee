"""Counting multiply-adds by the formulas of torch's flop counter, quickly where a model runs on the meta device.

There an operator only works out the shapes of its results, and many do so in slow Python. The blocks of a model, and
the forwards that are counted for a patch, run the same operators on the same shapes again and again: what they give
and cost is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from tokenprune.attention_calls import AttentionCall, AttentionCalls

_TENSORS = (Tensor, torch.nn.Parameter)
# Arguments that are their value and no more.
_VALUES = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside of it, as torch's FlopCounterMode does, but for the modules that it ran in.

    flops: so far, 2 for a multiply-add.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @property
    def multiply_adds(self) -> int:
        """So far."""
        return self.flops // 2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind == "composed":
            with FlopCounterMode(display=False, custom_mapping=_SOLVERS) as counter:
                out = func(*args, **kwargs)
            self.flops += counter.get_total_flops()
            return out
        known = _known(func, args, kwargs) if kind == "new" else None
        if known is None:
            out = func(*args, **kwargs)
            self.flops += _flops(func, args, kwargs, out)
            return out
        results, flops = known
        self.flops += flops
        made = tuple(map(_built, results))
        return made if len(made) > 1 else made[0]


class MathAttention(AttentionCalls):
    """torch's attention as products of matrices, which a count sees where it calls a fused kernel otherwise; in this
    thread alone, while `torch.nn.attention.sdpa_kernel` switches all threads over, and models that run in them."""

    def attend(self, call: AttentionCall) -> Tensor:
        query, key, value, mask, dropout, causal, scale, grouped = call
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
        out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )[0]
        return out


def _factorized(matrix: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a Cholesky factorisation [..., n, n]."""
    return prod(matrix[:-1]) * matrix[-1] ** 2 // 3


def _solved(values: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs of solving for values [..., n, m] with a Cholesky factor: one triangular system after the other."""
    return 2 * prod(values) * values[-2]


# The counter knows neither; in its global table they could collide with another library's formulas.
_SOLVERS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.linalg_cholesky_ex: _factorized,
    torch.ops.aten.cholesky_solve: _solved,
}
_SOLVER_FORMULAS = {packet: shape_wrapper(f) for packet, f in _SOLVERS.items()}  # type: ignore[no-untyped-call]


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    formula = _SOLVER_FORMULAS.get(packet) or flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


@cache
def _kind(func: Any) -> Literal["new", "other", "composed"]:
    """Whether an operator gives new tensors and does nothing else, or is composed of others."""
    is_operator = isinstance(func, torch._ops.OpOverload)
    if not is_operator or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return "composed"
    returns = func._schema.returns
    new = all(isinstance(r.type, torch.TensorType) and r.alias_info is None for r in returns)
    return "new" if returns and new and not func._schema.is_mutable else "other"


class _Undescribed(Exception):
    """A tensor or argument is more than its description."""


def _known(func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], int] | None:
    try:
        return _worked_out(func, _described(args), _described(tuple(kwargs.items())), torch.get_default_dtype())
    except _Undescribed:
        return None


@lru_cache(maxsize=8192)
def _worked_out(
    func: Any, args: tuple[Any, ...], kwargs: tuple[Any, ...], default_dtype: torch.dtype
) -> tuple[tuple[Any, ...], int]:
    """Descriptions of what func(*args, **kwargs) gives, and its FLOPs."""
    given, named = _built(args), dict(_built(kwargs))
    out = func(*given, **named)
    results = tuple(_described(x) for x in (out if isinstance(out, tuple) else (out,)))
    return results, _flops(func, given, named, out)


def _described(value: Any) -> tuple[Any, ...]:
    """(size, stride, dtype) of a tensor; of anything else its class as well: 1, 1.0 and True are equal, but not as
    arguments."""
    kind = type(value)
    if kind in _TENSORS:
        if not value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise _Undescribed
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return kind, tuple([_described(part) for part in value])
    if kind in _VALUES:
        return kind, value
    raise _Undescribed


def _built(described: tuple[Any, ...]) -> Any:
    """What has that description."""
    if len(described) == 3:
        return _empty(*described)
    kind, value = described
    return kind(map(_built, value)) if kind in (tuple, list) else value


def _empty(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")
