"""What the attention operations do to their inputs alike."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# An exported program is to run without this package, so small operations are traced as torch's own there. Before
# torch 2.7 exporting looks like compiling.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

# Bytes of a map that a thread works on at a time, so that they stay in its cache.
CACHED = 2 * 2**20

BINARY = math.log2(math.e)
"""What to multiply a logit by for the power of two that is its exponential, which torch computes in a third to a half
of the time on a CPU."""

EPSILON = 1e-12  # the smallest norm to divide by, as in torch's normalize


def observed(*tensors: Tensor) -> bool:
    """Whether anything sees which operators run: a compiler or tracer, a counter, a profiler, torch.func's transforms,
    tensors without data, autograd. Elsewhere an operator's own function is called, as the operator around it costs a
    CPU some 30 microseconds a call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or transformed()
        or any(type(x) is not Tensor or x.is_meta or (x.requires_grad and torch.is_grad_enabled()) for x in tensors)
    )


def transformed() -> bool:
    """Whether a torch.func transform is under way: none of these goes through an operator's own backward."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def at_once(device: torch.device, memory_limit: int | None) -> int:
    """Bytes of intermediate results to hold at a time, where the caller sets no limit: 64 MiB, on a GPU, where each
    further call costs more than what it does, 512 MiB."""
    if memory_limit is not None:
        return memory_limit
    return 2**29 if device.type == "cuda" else 2**26


# Since torch 2.8 halves are multiplied on a GPU as they are, and summed and given back in float32.
_INTO_FLOAT32 = hasattr(torch.ops.aten.bmm, "dtype")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, M, D] times b [n, D, N], in `precision`."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and a.dtype == b.dtype and _INTO_FLOAT32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    dtype = precision(a)
    return torch.bmm(a.to(dtype), b.to(dtype))


def repeat_heads(k: Tensor, heads: int) -> Tensor:
    """Keys [B, H / g, N, D] of grouped queries, each head g times: [B, H, N, D]."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], dim=1)


def mean_over_heads(x: Tensor) -> Tensor:
    """The mean over H of x [B, H, N, D] as [B, N, D].

    On a CPU head by head, which takes two thirds of the time: the heads of a token lie side by side in what a fused
    projection puts out, and a sum over them would go from token to token.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.shape[1] < 2 or exporting():
        return x.mean(1)
    first, second, *others = x.unbind(1)
    total = first + second
    for head in others:
        total.add_(head)
    return total.div_(x.shape[1])


def additive(bias: Tensor) -> Tensor:
    """A mask (True: may be attended to) as a bias of 0 and -inf; a bias as it is."""
    if bias.dtype != torch.bool:
        return bias
    return torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, float("-inf"))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operators on x's device keep the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def some_rows(
    batch: int, rows: int, row_bytes: int, memory_limit: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Images and rows that take `memory_limit` bytes together at `row_bytes` a row, but at least one row; on a CPU
    rather what fits its cache."""
    work = min(memory_limit, CACHED * torch.get_num_threads()) if device.type == "cpu" else memory_limit
    block = max(1, min(rows, work // row_bytes))
    images = max(1, min(batch, work // (block * row_bytes)))
    for image in range(0, batch, images):
        for start in range(0, rows, block):
            yield slice(image, image + images), slice(start, start + block)


def precision(q: Tensor) -> torch.dtype:
    """Scores are computed and returned in float32, in float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
