"""Attention over a ragged batch against the naive loop."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenprune.kernels.packed_attention import BACKENDS, choose_backend, dispatch, fused, packed_attention
from tokenprune.kernels.packed_attention.reference import packed_attention as naive

LENGTHS = {
    "mixed": (5, 63, 63, 1, 0, 197, 1, 1, 0),
    "large": (257, 1025),
    "equal": (37, 37, 37),
    "one": (63,),
    "single tokens": (1, 1, 1),
    "empty images": (0, 0),
    "no image": (),
}
# What runs without a GPU: FlexAttention has no gradient there.
HERE = ("per_length", "nested", "flex")


def ragged(lengths: tuple[int, ...], heads: int = 3, size: int = 40, dtype: torch.dtype = torch.float32) -> Any:
    """q, k, v [T, H, D] as views of one projection, a bias [T], and cumulative lengths. Logits reach far from zero."""
    generator = torch.Generator().manual_seed(sum(lengths))
    qkv = 2 * torch.randn(sum(lengths), 3, heads, size, generator=generator)
    bias = torch.randint(1, 30, (sum(lengths),), generator=generator).float().log()
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return *qkv.to(dtype).unbind(1), bias, starts


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", HERE)
def test_agrees_with_the_reference(backend: str, lengths: tuple[int, ...], biased: bool) -> None:
    q, k, v, bias, starts = ragged(lengths)
    extra = {"key_bias": bias} if biased else {}
    expected = naive(q.double(), k.double(), v.double(), lengths, **extra)
    with sdpa_kernel(SDPBackend.MATH):  # of nested tensors, on a CPU, only that
        out = packed_attention(q, k, v, starts, backend=backend, scale=None, **extra)
    assert out.shape == v.shape
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", HERE)
def test_scale_and_another_size_of_the_values(backend: str) -> None:
    lengths = (4, 9, 9)
    q, k, v, bias, starts = ragged(lengths)
    v = torch.cat([v, 3 - v], -1)
    expected = naive(q, k, v, lengths, key_bias=bias, scale=0.05)
    with sdpa_kernel(SDPBackend.MATH):
        out = packed_attention(q, k, v, starts, key_bias=bias, scale=0.05, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["per_length", "nested"])
def test_gradients(backend: str) -> None:
    lengths = LENGTHS["mixed"]
    q, k, v, bias, starts = ragged(lengths)
    leaves = [x.double().requires_grad_() for x in (q, k, v, bias)]
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = torch.autograd.grad((naive(*leaves[:3], lengths, key_bias=leaves[3]) * weight).sum(), leaves)
    with sdpa_kernel(SDPBackend.MATH):
        out = packed_attention(*leaves[:3], starts, key_bias=leaves[3], backend=backend)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    # The folded bias is a float32: what its rounding costs shows in double precision.
    tolerance = 1e-9 if backend == "per_length" else 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["per_length", "nested"])
def test_nan_stays_in_its_image(backend: str) -> None:
    lengths = (5, 7, 7, 30)
    q, k, v, bias, starts = ragged(lengths)
    with sdpa_kernel(SDPBackend.MATH):
        good = packed_attention(q, k, v, starts, key_bias=bias, backend=backend)
        broken = [x.clone() for x in (q, k, v)]
        for x in broken:
            x[5:12] = float("nan")
        bad = packed_attention(*broken, starts, key_bias=bias, backend=backend)
    assert bad[5:12].isnan().all()
    keep = torch.cat([torch.arange(5), torch.arange(12, 49)])
    torch.testing.assert_close(bad[keep], good[keep], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", HERE)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype, backend: str) -> None:
    lengths = (63, 63, 1, 130)
    q, k, v, bias, starts = ragged(lengths, dtype=dtype)
    exact = naive(q.double(), k.double(), v.double(), lengths, key_bias=bias.double())
    if backend == "nested":  # torch's attention over nested tensors rounds the map on a CPU, as the loop does
        plain = naive(q, k, v, lengths, key_bias=bias.to(dtype))
    else:
        calls = []
        for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            parts = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            mask = bias[None, start:stop].to(dtype)
            calls.append(F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(0, 1))
        plain = torch.cat(calls)
    error = (plain.double() - exact).abs().max()
    with sdpa_kernel(SDPBackend.MATH) if backend == "nested" else nullcontext():
        out = packed_attention(q, k, v, starts, key_bias=bias, backend=backend)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 2 * error


def test_images_of_equal_length_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    plain = F.scaled_dot_product_attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(q.shape))
        return plain(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v, _, starts = ragged((4, 9, 9, 0, 9, 11))
    packed_attention(q, k, v, starts)
    assert shapes == [(1, 3, 4, 40), (3, 3, 9, 40), (1, 3, 11, 40)]


def test_lengths_on_the_host_are_enough() -> None:
    q, k, v, _, starts = ragged((4, 9))
    assert torch.equal(packed_attention(q, k, v, starts.to("meta"), lengths=(4, 9)), packed_attention(q, k, v, starts))


def test_dropout_drops_attention_weights() -> None:
    q, k, _, _, starts = ragged((50, 50))
    v = torch.ones_like(q)
    torch.manual_seed(0)
    out = packed_attention(q, k, v, starts, dropout=0.5)
    assert not torch.equal(out, v)
    assert out.mean() == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match="dropout"):
        packed_attention(q, k, v, starts, dropout=0.5, backend="flex")


class Gpu:
    """As much of a CUDA tensor as the choice of a backend looks at."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, size: int = 64, dtype: torch.dtype = torch.float16) -> None:
        self.shape, self.dtype = (10, 2, size), dtype


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], Any]:
    """The optional libraries that are there, none by default, on a GPU of compute capability 8.0."""
    there: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(fused, "optional", lambda module, name: there.get((module, name)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return there


def chosen(q: Any, v: Any = None, **kwargs: Any) -> str:
    choice = choose_backend(q, q if v is None else v, **kwargs)
    assert choice.reason
    assert choice.backend in BACKENDS
    return choice.backend


def test_the_choice_on_a_gpu(installed: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = Gpu(), Gpu(dtype=torch.float32)
    assert chosen(half) == chosen(single) == "nested"
    installed["xformers.ops", "memory_efficient_attention"] = object()
    assert chosen(half) == "nested"  # without kernels that load
    installed["xformers", "_has_cpp_library"] = True
    assert chosen(half) == chosen(single) == "block_diagonal"
    installed["torch.nn.attention.varlen", "varlen_attn"] = object()
    assert chosen(half) == "varlen"
    assert chosen(half, dropout=0.1) == "block_diagonal"
    installed["flash_attn", "flash_attn_varlen_func"] = object()
    assert chosen(half, dropout=0.1) == "varlen"
    assert chosen(single) == "block_diagonal"
    assert chosen(Gpu(256)) == "varlen"
    assert chosen(Gpu(256), key_bias=True) == "block_diagonal"  # two more dimensions than flash attention takes
    assert chosen(Gpu(60)) == "per_length"
    assert chosen(Gpu(60), key_bias=True) == "varlen"  # padded with the bias
    assert chosen(half, Gpu(128)) == "block_diagonal"
    assert chosen(Gpu(dtype=torch.float64)) == "per_length"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen(half) == "block_diagonal"


def test_the_choice_keeps_to_the_callers_backend(installed: dict[tuple[str, str], Any]) -> None:
    installed["xformers.ops", "memory_efficient_attention"] = object()
    installed["xformers", "_has_cpp_library"] = True
    installed["torch.nn.attention.varlen", "varlen_attn"] = object()
    with sdpa_kernel(SDPBackend.MATH):
        assert chosen(Gpu()) == "per_length"
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert chosen(Gpu()) == "block_diagonal"


def test_the_choice_on_a_cpu() -> None:
    q = torch.zeros(3, 2, 8)
    assert "cpu" in choose_backend(q, q).reason
    assert chosen(q) == "per_length"


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("library", ["torch", "flash_attn", "xformers"])
def test_calls_of_libraries_that_need_a_gpu(library: str, biased: bool, installed: dict[tuple[str, str], Any]) -> None:
    """Stand-ins with the libraries' signatures, which answer by the naive loop."""
    lengths = (5, 0, 9, 9)
    q, k, v, bias, starts = ragged(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0
        return naive(q, k, v, lengths, scale=scale)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        assert cu_seq_q.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == 9
        return attend(query, key, value, cu_seq_q.diff().tolist(), scale)

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None):
        assert dropout_p == (0.0 if biased else 0.25)
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale)

    class BlockDiagonalMask(types.SimpleNamespace):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            return cls(lengths=q_seqlen)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape[0] == 1
        return attend(query[0], key[0], value[0], attn_bias.lengths, scale)[None]

    installed.update(
        {
            "torch": {("torch.nn.attention.varlen", "varlen_attn"): varlen_attn},
            "flash_attn": {("flash_attn", "flash_attn_varlen_func"): flash},
            "xformers": {
                ("xformers.ops.fmha.attn_bias", "BlockDiagonalMask"): BlockDiagonalMask,
                ("xformers.ops", "memory_efficient_attention"): memory_efficient_attention,
            },
        }[library]
    )
    extra: dict[str, Any] = {"key_bias": bias} if biased else {}
    expected = naive(q, k, v, lengths, **extra)
    if library == "flash_attn" and not biased:
        extra["dropout"] = 0.25
    backend = "block_diagonal" if library == "xformers" else "varlen"
    out = packed_attention(q, k, v, starts, backend=backend, **extra)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_a_folded_bias_may_forbid_a_key() -> None:
    lengths = (6, 3)
    q, k, v, bias, _ = ragged(lengths)
    bias[[1, 7]] = float("-inf")
    folded = fused.fold_bias(q, k, v, bias, scale=0.3)
    out = naive(*folded, lengths, scale=0.3)[..., : v.shape[-1]]
    torch.testing.assert_close(out, naive(q, k, v, lengths, key_bias=bias, scale=0.3), rtol=0, atol=2e-5)


def test_every_backend_is_known() -> None:
    assert set(BACKENDS) == {"per_length", *dispatch.FUSED}
