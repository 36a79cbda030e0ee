"""What the Triton paths share: tuning, padding and the device to launch on. Imports Triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter multiplies the bits of bfloat16, so products are of float32 there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def _config(rows: int, columns: int, warps: int) -> triton.Config:
    # Without the cap the assembler takes fewer registers than there are and spills a few bytes.
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": columns}, num_warps=warps, num_stages=2, maxnreg=255)


PRODUCT_CONFIGS = [
    _config(64, 64, 4),
    _config(128, 64, 8),
    _config(32, 64, 4),
    _config(64, 32, 4),
    _config(32, 64, 8),
    _config(16, 64, 8),
]


def tuned_product(key: list[str], extra: Callable[[dict[str, Any]], int]) -> Callable[[Any], Any]:
    """`triton.autotune` of a matrix product that is reduced where it is made, over the blocks that spill no registers.

    extra: what the kernel holds beside the product, by its options, in inner dimensions of the product. Under the
    interpreter, which has no driver to time with: blocks of 128.
    """

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
        itemsize = next(value for value in arguments.values() if isinstance(value, Tensor)).element_size()
        depth = itemsize * (max(options["BLOCK_D"], 64) + extra(options))
        # The bound was found by compiling all of them for sm_80, sm_90 and sm_100; a test compiles what it leaves.
        return [c for c in configs if c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] * depth <= 2**17 * c.num_warps]

    return autotuned(PRODUCT_CONFIGS, key, prune)


def autotuned(configs: list[triton.Config], key: list[str], prune: Any = None) -> Callable[[Any], Any]:
    """`triton.autotune`; under the interpreter, which has no driver to time with, blocks of 128."""
    if INTERPRETED.value:
        fixed = {name: lambda arguments: 128 for name in configs[0].kwargs}
        return triton.heuristics(fixed)  # type: ignore[no-any-return]
    by = {"early_config_prune": prune} if prune else None
    return triton.autotune(configs, key, prune_configs_by=by)  # type: ignore[no-any-return]


def bucket(size: int) -> int:
    """Token counts differ from block to block in a pruned model: those up to the same power of two share a tuning."""
    return triton.next_power_of_2(size)  # type: ignore[no-any-return]


def padded_dim(dim: int) -> int:
    """The head dimension as a block: a power of two, which a product needs to be at least 16."""
    return max(16, bucket(dim))


def inner_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous; the others may have any strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
