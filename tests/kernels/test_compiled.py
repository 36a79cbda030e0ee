"""Every configuration that autotuning would try compiles for every GPU generation, and keeps its registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_compile import CAPABILITIES, launches_of, resources
from kernel_inputs import attention_inputs, groups

from tokenprune.kernels.attention_mass import triton as attention_mass
from tokenprune.kernels.class_attention import triton as class_attention
from tokenprune.kernels.matching import triton as matching
from tokenprune.kernels.merge import triton as merge

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (head dimension, tokens): kernels are compiled apart for sizes and strides that are multiples of 16.
SHAPES = ((128, 192), (128, 197), (64, 192), (64, 197), (32, 197), (80, 197), (40, 197), (20, 197))
BIASES = {"none": None, "keys": (1, 1, 1), "pairs": (1, 2, None)}


def mass(bias: str) -> Callable[..., Any]:
    def run(dtype: torch.dtype, dim: int, tokens: int) -> None:
        q, k, weights = (x.to(dtype) for x in attention_inputs(1, 2, tokens, dim))
        shape = BIASES[bias]
        added = (
            None if shape is None else torch.zeros(*(tokens if n is None else n for n in shape), tokens, dtype=dtype)
        )
        attention_mass.attention_mass(q, k, weights, added, [1], 0.0, 0.1)

    return run


def rows(dtype: torch.dtype, dim: int, tokens: int) -> None:
    q, k, _ = (x.to(dtype) for x in attention_inputs(1, 2, tokens, dim))
    class_attention.few_logits(q[:, :, :1], k, 0.1)


def match(window: int) -> Callable[..., Any]:
    def run(dtype: torch.dtype, dim: int, tokens: int) -> None:
        metric = attention_inputs(2, 1, tokens, dim)[1][:, 0].to(dtype)
        matching.cosine_match(metric[:, ::2], metric[:, 1::2], window)

    return run


def merging(dtype: torch.dtype, dim: int, tokens: int) -> None:
    x, sizes, *indices = groups(2, tokens, 6 * dim)
    merge.merge(x.to(dtype), *indices, sizes)
    merge.gather(x.to(dtype), indices[0], 1)


def gathering_tables(dtype: torch.dtype, dim: int, tokens: int) -> None:
    _, sizes, kept, *_ = groups(2, tokens, 1)
    merge.gather(sizes.to(dtype), kept, 1)
    merge.gather(kept, kept, 1)
    merge.gather(torch.zeros(1, 2, tokens, tokens, dtype=dtype), kept, 3)


CASES = {
    **{f"mass, bias {name}": mass(name) for name in BIASES},
    "rows": rows,
    "match": match(-1),
    "match in windows": match(3),
    "merge": merging,
    "tables": gathering_tables,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def spilled(run: Callable[[], object], capability: int, only: int | None = None) -> Iterator[str]:
    """What spills of the configurations that autotuning would try (the first `only`)."""
    launches = launches_of(run)
    assert launches
    for launch in launches:
        configs = launch.configs()
        assert configs
        for config in configs[:only]:
            taken = resources(launch, config, capability)
            assert 0 < taken.registers <= 255
            if taken.stack or taken.local:
                yield f"{launch.kernel.fn.__name__}, {config}: {taken}"


@pytest.mark.parametrize(
    ("dtype", "shape", "capability"), [(torch.float32, (128, 197), 80), (torch.bfloat16, (64, 192), 100)], ids=str
)
@pytest.mark.parametrize("case", ["mass, bias pairs", "rows", "match", "merge"])
def test_the_first_keeps_its_registers(case: str, dtype: torch.dtype, shape: tuple[int, int], capability: int) -> None:
    assert not list(spilled(lambda: CASES[case](dtype, *shape), capability, only=1))


@pytest.mark.full
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_none_spills(case: str, dtype: torch.dtype, shape: tuple[int, int], capability: int) -> None:
    assert not list(spilled(lambda: CASES[case](dtype, *shape), capability))


def test_a_spill_would_be_seen() -> None:
    launch = launches_of(lambda: CASES["mass, bias none"](torch.float16, 64, 192))[1]
    taken = resources(launch, triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, maxnreg=40), 80)
    assert taken.stack > 0
