"""The Triton paths against the naive references: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import kernel_inputs
import pytest
import torch
from kernel_inputs import INTERPRETED, TOKENS, TRITON_DEVICE, error
from torch import Tensor
from torch.nn import functional as F

from tokenprune.kernels.attention_mass import attention_mass, mass_and_log_sums
from tokenprune.kernels.attention_mass.reference import attention_mass as naive_mass
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.class_attention.reference import class_attention as naive_class
from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.merge import gather, merge, unmerge

attention_inputs = partial(kernel_inputs.attention_inputs, device=TRITON_DEVICE)
groups = partial(kernel_inputs.groups, device=TRITON_DEVICE)
rows = partial(kernel_inputs.rows, device=TRITON_DEVICE)
# The interpreter takes a millisecond for each line of each program.
FEW_OR_MANY = [
    pytest.param(tokens, marks=pytest.mark.full if INTERPRETED and tokens >= 250 else []) for tokens in TOKENS
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def best(a: Tensor, b: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)
    if window is not None:
        own, other = (torch.arange(x.shape[1], device=x.device) for x in (a, b))
        far = (other - (own * b.shape[1] // a.shape[1])[:, None]).abs() > window
        similarity = similarity.masked_fill(far, -2.0)
    value, row = similarity.max(-1)
    return value, row


@pytest.mark.parametrize("tokens", FEW_OR_MANY)
def test_mass(tokens: int) -> None:
    q, k, weights = attention_inputs(2, 2, tokens, 20)
    mass = attention_mass(q, k, weights, iterations=2, backend="triton")
    torch.testing.assert_close(mass, naive_mass(q, k, weights, iterations=2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 3, 97), (2, 3, 97)], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_mass_under_a_bias(shape: tuple[int, int, int], mask: bool) -> None:
    q, k, weights = attention_inputs(2, 3, 97, 16)
    bias = torch.randn(*shape, 97, generator=torch.Generator().manual_seed(sum(shape))).to(TRITON_DEVICE)
    if mask:
        bias = bias > 0.5
        bias[0, 0, 0] = False
    mass, log_sums = mass_and_log_sums(q, k, weights, iterations=2, bias=bias, backend="triton")
    torch.testing.assert_close(mass, naive_mass(q, k, weights, iterations=2, bias=bias), rtol=1e-4, atol=1e-6)
    eager_sums = mass_and_log_sums(q, k, weights, bias=bias, backend="eager")[1]
    torch.testing.assert_close(log_sums, eager_sums, rtol=1e-4, atol=1e-5)


def test_mass_of_some_queries_and_of_shared_key_heads() -> None:
    q, k, weights = attention_inputs(2, 4, 197, 40)
    few = (q[:, :, 5:50], k, weights[:, :, 5:50])
    torch.testing.assert_close(attention_mass(*few, backend="triton"), naive_mass(*few), rtol=1e-4, atol=1e-6)
    got = attention_mass(q, k[:, :2], weights, iterations=(1, 3), backend="triton")
    shared = k[:, :2].repeat_interleave(2, 1)
    for mass, count in zip(got, (1, 3), strict=True):
        torch.testing.assert_close(mass, naive_mass(q, shared, weights, iterations=count), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", FEW_OR_MANY)
@pytest.mark.parametrize("part", [0, slice(0, 2)], ids=str)
def test_rows_of_attention(tokens: int, part: int | slice) -> None:
    q, k, _ = attention_inputs(2, 3, tokens, 20)
    got = class_attention(q, k, rows=part, backend="triton")
    torch.testing.assert_close(got, naive_class(q, k, rows=part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, *FEW_OR_MANY[1:]])
@pytest.mark.parametrize("window", [None, 0, 40])
def test_matches(tokens: int, window: int | None) -> None:
    a, b = rows(2, tokens // 2, 40), rows(2, tokens - tokens // 2, 40, seed=1)
    value, row = cosine_match(a, b, window=window, backend="triton")
    expected_value, expected_row = best(a, b, window)
    torch.testing.assert_close(value, expected_value)
    assert torch.equal(row, expected_row)


def test_a_match_of_equal_rows_is_the_lower() -> None:
    a, b = rows(2, 100, 64), rows(2, 130, 64, seed=1)
    twice = torch.cat([b, b], 1)
    assert torch.equal(cosine_match(a, twice, backend="triton")[1], cosine_match(a, b, backend="triton")[1])
    assert (cosine_match(a, torch.ones_like(b), backend="triton")[1] == 0).all()


@pytest.mark.parametrize("tokens", FEW_OR_MANY)
@pytest.mark.parametrize("channels", [20, 200])
def test_merging(tokens: int, channels: int) -> None:
    x, sizes, *indices = groups(2, tokens, channels)
    for given in (sizes, None):
        got = merge(x, *indices, given, backend="triton")
        for one, expected in zip(got, merge(x, *indices, given, backend="eager"), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(unmerge(got[0], *indices, backend="triton"), unmerge(got[0], *indices, backend="eager"))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 9), 1), ((3, 9, 200), 1), ((1, 9, 5), 1), ((3, 9, 2, 4), 1), ((3, 2, 9, 5), 2), ((1, 2, 9, 9), 3)],
    ids=str,
)
def test_gathering(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, device=TRITON_DEVICE)
    index = torch.randint(0, 9, (3, 150), generator=torch.Generator().manual_seed(0)).to(TRITON_DEVICE)
    for dtype in (torch.float32, torch.long, torch.bool):
        one = (10 * x).to(dtype)
        expected = gather(one, index, dim=dim, backend="eager")
        assert torch.equal(gather(one, index, dim=dim, backend="triton"), expected)
        if one.ndim > 2:
            strided = one.transpose(-1, -2).contiguous().transpose(-1, -2)
            assert torch.equal(gather(strided, index, dim=dim, backend="triton"), expected)
    assert gather(x, index[:, :0], dim=dim, backend="triton").shape[dim] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    q, k, weights = (x.to(dtype) for x in attention_inputs(1, 2, 257, 64))
    exact = naive_mass(q.double(), k.double(), weights.double(), iterations=5)
    mass = attention_mass(q, k, weights, iterations=5, backend="triton")
    assert error(mass, exact) <= 2 * error(naive_mass(q, k, weights, iterations=5), exact)

    exact = naive_class(q.double(), k.double())
    assert error(class_attention(q, k, backend="triton"), exact) <= 2 * error(naive_class(q, k), exact)

    a, b = rows(2, 128, 64).to(dtype), rows(2, 129, 64, seed=1).to(dtype)
    exact, exact_row = best(a.double(), b.double())
    value, row = cosine_match(a, b, backend="triton")
    assert error(value, exact) <= 2 * error(best(a, b)[0], exact)
    assert (row != exact_row).sum() <= (best(a, b)[1] != exact_row).sum()

    x, sizes, *indices = groups(2, 100, 64)
    x = x.to(dtype)
    exact = merge(x.double(), *indices, sizes.double(), backend="eager")[0]
    merged = merge(x, *indices, sizes, backend="triton")[0]
    assert merged.dtype == dtype
    assert error(merged, exact) <= 2 * error(merge(x, *indices, sizes.to(dtype), backend="eager")[0], exact)
    assert torch.equal(gather(x, indices[0], backend="triton"), gather(x, indices[0], backend="eager"))


def test_nan_stays_in_its_image() -> None:
    q, k, weights = attention_inputs(3, 2, 63, 16)
    a, b = rows(3, 20, 8), rows(3, 30, 8, seed=1)
    x, sizes, *indices = groups(3, 63, 8)
    runs = {
        "mass": lambda: attention_mass(q, k, weights, iterations=2, backend="triton"),
        "rows": lambda: class_attention(q, k, backend="triton"),
        "match": lambda: cosine_match(a, b, backend="triton")[0],
        "merge": lambda: merge(x, *indices, sizes, backend="triton")[0],
        "gather": lambda: gather(x, indices[0], backend="triton"),
    }
    good = {name: run() for name, run in runs.items()}
    q[1, 0], b[1, 7, 2], x[1] = float("nan"), float("nan"), float("nan")
    for name, run in runs.items():
        spoilt = run()
        assert spoilt[1].isnan().any(), name
        assert torch.equal(spoilt[[0, 2]], good[name][[0, 2]]), name


def test_empty_batches() -> None:
    q, k, weights = (x[:0] for x in attention_inputs(1, 2, 9, 4))
    assert attention_mass(q, k, weights, iterations=2, backend="triton").shape == (0, 2, 9)
    assert class_attention(q, k, backend="triton").shape == (0, 2, 9)
    assert cosine_match(q[:, 0], k[:, 0], backend="triton")[1].shape == (0, 9)


def test_gradients() -> None:
    x, sizes, *indices = groups(2, 63, 20)
    q, k, _ = attention_inputs(2, 2, 63, 16)
    repeated = torch.tensor([[1, 1, 0], [8, 2, 8]], device=TRITON_DEVICE)
    pictures = torch.randn(2, 3, 9, 4, device=TRITON_DEVICE)
    for run, leaves in (
        (lambda backend, x, sizes: merge(x, *indices, sizes, backend=backend), (x, sizes)),
        (lambda backend, x: unmerge(x, *indices, backend=backend), (gather(x, indices[0]),)),
        (lambda backend, x: gather(x, repeated, dim=2, backend=backend), (pictures,)),
        (lambda backend, x: gather(x, repeated, dim=2, backend=backend), (pictures[:1],)),
        (lambda backend, q, k: class_attention(q, k, backend=backend), (q, k)),
    ):
        found = []
        for backend in ("triton", "eager"):
            own = [leaf.detach().requires_grad_() for leaf in leaves]
            outs = run(backend, *own)
            outs = outs if isinstance(outs, tuple) else (outs,)
            loss = sum((out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).sum() for out in outs)
            found.append(torch.autograd.grad(loss, own))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_the_operators_are_well_formed(training: bool) -> None:
    q, k, weights = (x.contiguous() for x in attention_inputs(2, 2, 9, 8))
    x, sizes, *indices = groups(2, 9, 3)
    x, sizes = x.contiguous().requires_grad_(training), sizes.requires_grad_(training)
    a, b = rows(2, 10, 4).contiguous(), rows(2, 12, 4, seed=1).contiguous()
    operators = torch.ops.tokenprune
    torch.library.opcheck(operators.gather.default, (x, indices[0], 1))
    torch.library.opcheck(operators.merge.default, (x, *indices, sizes, "triton"))
    few = q[:, :, :1].clone().requires_grad_(training)
    torch.library.opcheck(operators.few_logits.default, (few, k.requires_grad_(training), 0.3, "triton"))
    if not training:
        mass = (q, k, weights, None, [1, 2], 0.0, 0.3, 2**20, "triton", True)
        torch.library.opcheck(operators.attention_mass.default, mass)
        torch.library.opcheck(operators.cosine_match.default, (a, b, -1, 2**20, "triton"))
