"""Every backend of the ragged attention that this GPU has, against the naive loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenprune.kernels.packed_attention import choose_backend, packed_attention
from tokenprune.kernels.packed_attention.fused import optional
from tokenprune.kernels.packed_attention.reference import packed_attention as naive

LENGTHS = {
    "mixed": (5, 63, 63, 1, 0, 197, 1, 1, 0),
    "large": (257, 1025),
    "one": (63,),
    "empty images": (0, 0),
}
BACKENDS = (
    *(
        ("varlen",)
        if optional("torch.nn.attention.varlen", "varlen_attn") or optional("flash_attn", "__version__")
        else ()
    ),
    *(("block_diagonal",) if optional("xformers", "_has_cpp_library") else ()),
    "nested",
    "flex",
    "per_length",
)


def ragged(lengths: tuple[int, ...], size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = 2 * torch.randn(sum(lengths), 3, 4, size, generator=generator)
    bias = torch.randint(1, 30, (sum(lengths),), generator=generator).float().log().cuda()
    return *qkv.cuda().to(dtype).unbind(1), bias, torch.tensor([0, *lengths]).cumsum(0).int().cuda()


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend: str, dtype: torch.dtype, lengths: tuple[int, ...], biased: bool) -> None:
    if backend == "varlen" and dtype == torch.float32:
        dtype = torch.float16  # flash attention is for halves
    q, k, v, bias, starts = ragged(lengths, 64, dtype)
    extra: dict[str, Any] = {"key_bias": bias} if biased else {}
    expected = naive(q.double(), k.double(), v.double(), lengths, **extra)
    rounded = naive(q, k, v, lengths, **({"key_bias": bias.to(dtype)} if biased else {}))
    out = packed_attention(q, k, v, starts, lengths=lengths, backend=backend, **extra)
    assert out.dtype == dtype
    if sum(lengths):
        assert (out - expected).abs().max() <= 2 * (rounded - expected).abs().max() + 1e-5


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "flex"])
def test_gradients(backend: str) -> None:
    q, k, v, _, starts = ragged(LENGTHS["mixed"], 64, torch.float16)
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).cuda()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad((naive(*leaves, LENGTHS["mixed"]) * weight).sum(), leaves)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*own, starts, lengths=LENGTHS["mixed"], backend=backend)
    found = torch.autograd.grad((out * weight).sum(), own)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_the_choice() -> None:
    for dtype, expected in ((torch.float16, BACKENDS[0]), (torch.bfloat16, BACKENDS[0]), (torch.float64, "per_length")):
        q, _, v, *_ = ragged((5, 7), 64, dtype)
        assert choose_backend(q, v).backend == expected
