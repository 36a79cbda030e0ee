"""The short paths that GPUs take where everything fits, against the naive references: on the GPU, or on the CPU."""

from __future__ import annotations

from functools import partial

import kernel_inputs
import pytest
import torch
from kernel_inputs import TRITON_DEVICE, error
from torch.nn import functional as F

from tokenprune.kernels.attention_mass import eager as mass
from tokenprune.kernels.attention_mass.reference import attention_mass as naive_mass
from tokenprune.kernels.attention_match import attention_match
from tokenprune.kernels.attention_match import eager as match
from tokenprune.kernels.attention_match.reference import attention_match as naive_match
from tokenprune.kernels.class_attention import class_attention
from tokenprune.kernels.class_attention.reference import class_attention as naive_class
from tokenprune.kernels.matching import eager as cosine
from tokenprune.kernels.merge import gather

attention_inputs = partial(kernel_inputs.attention_inputs, device=TRITON_DEVICE)
rows = partial(kernel_inputs.rows, device=TRITON_DEVICE)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCALE = 0.3


@pytest.mark.parametrize("shape", [None, (1, 1, 1), (2, 1, 1), (1, 3, 97), (2, 3, 97)], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_mass(shape: tuple[int, int, int] | None, mask: bool) -> None:
    q, k, weights = attention_inputs(2, 3, 97, 16)
    bias = None
    if shape is not None:
        bias = torch.randn(*shape, 97, generator=torch.Generator().manual_seed(sum(shape))).to(TRITON_DEVICE)
    if mask and bias is not None:
        bias = bias > 0.5
        bias[0, 0, 0] = False
    log_sums, expected_sums = q.new_empty(2, 3, 97), q.new_empty(2, 3, 97)
    found = mass.all_at_once(q, k, weights, bias, [1, 3], 0.0, SCALE, log_sums)
    for one, count in zip(found, (1, 3), strict=True):
        expected = naive_mass(q, k, weights, iterations=count, bias=bias, scale=SCALE)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
    mass.matrix_free(q, k, weights, bias, [1], 0.0, SCALE, 2**16, expected_sums)
    torch.testing.assert_close(log_sums, expected_sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 63, 197])
def test_cosines(tokens: int) -> None:
    a, b = rows(2, tokens, 40), rows(2, tokens + 3, 40, seed=1)
    value, row = cosine.all_at_once(a, b)
    expected, expected_row = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).max(-1)
    torch.testing.assert_close(value, expected)
    assert torch.equal(row, expected_row)
    twice = torch.cat([b, b], 1)
    assert torch.equal(cosine.all_at_once(a, twice)[1], row)
    assert (cosine.all_at_once(torch.zeros_like(a), b)[0] == 0).all()


@pytest.mark.parametrize("known", [False, True])
def test_matches_by_attention(known: bool) -> None:
    q, k, weights = attention_inputs(2, 3, 97, 16)
    columns = torch.stack([torch.arange(0, 97, 2), torch.arange(1, 98, 2) % 97]).to(TRITON_DEVICE)
    log_sums = q.new_empty(2, 3, 97)
    mass.all_at_once(q, k, weights, None, [1], 0.0, SCALE, log_sums)
    found = match.all_at_once(q, k, columns, SCALE, log_sums if known else None)
    assert torch.equal(found, naive_match(q, k, columns, scale=SCALE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    q, k, weights = (x.to(dtype) for x in attention_inputs(1, 2, 257, 64))
    exact = naive_mass(q.double(), k.double(), weights.double(), iterations=5)
    plain = error(naive_mass(q, k, weights, iterations=5), exact)
    assert error(mass.all_at_once(q, k, weights, None, [5], 0.0, 0.125)[0], exact) <= 2 * plain
    exact = naive_class(q.double(), k.double())
    assert error(class_attention(q, k, backend="eager"), exact) <= 2 * error(naive_class(q, k), exact)
    a, b = rows(2, 128, 64).to(dtype), rows(2, 129, 64, seed=1).to(dtype)
    exact = (F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).transpose(1, 2)).amax(-1)
    plain = error((F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).amax(-1), exact)
    assert error(cosine.all_at_once(a, b)[0], exact) <= 2 * plain


def test_what_the_device_takes_by_itself() -> None:
    q, k, _ = attention_inputs(2, 3, 97, 16)
    columns = torch.arange(0, 97, 3).expand(2, -1).to(TRITON_DEVICE)
    assert torch.equal(attention_match(q, k, columns), naive_match(q, k, columns))
    x, index = rows(3, 40, 20), torch.randint(0, 40, (3, 17)).to(TRITON_DEVICE)
    assert torch.equal(
        gather(x, index, backend="eager"), torch.stack([one[i] for one, i in zip(x, index, strict=True)])
    )
