"""The kernels against their references over drawn shapes, memory limits, biases and magnitudes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cheap
from torch import Tensor

from tokenprune.kernels import attention_mass as mass
from tokenprune.kernels import attention_match as match
from tokenprune.kernels import attention_peak as peak
from tokenprune.kernels import class_attention as rows
from tokenprune.kernels import matching, packed_attention, pairwise
from tokenprune.kernels.attention_mass import reference as naive_mass
from tokenprune.kernels.attention_match import reference as naive_match
from tokenprune.kernels.attention_peak import reference as naive_peak
from tokenprune.kernels.class_attention import reference as naive_rows
from tokenprune.kernels.matching import reference as naive_matching
from tokenprune.kernels.packed_attention import reference as naive_packed
from tokenprune.kernels.pairwise import reference as naive_pairwise

LIMITS = st.sampled_from([None, 1, 100, 4096])
SIDES = st.integers(1, 9)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    """In float64, of any magnitude, sometimes with equal rows, and not always contiguous."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    x = x * draw(st.sampled_from([0.01, 1.0, 10.0]))
    if len(shape) > 2 and draw(st.booleans()):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


@st.composite
def heads(draw: st.DrawFn, square: bool = False) -> tuple[Tensor, Tensor]:
    """Queries [B, H, M, D] and keys [B, H, N, D], where `square` M is N."""
    batch, count, tokens, dim = draw(st.tuples(st.integers(0, 3), st.integers(1, 3), SIDES, st.integers(1, 5)))
    others = tokens if square else draw(SIDES)
    return draw(tensors(batch, count, tokens, dim)), draw(tensors(batch, count, others, dim))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@cheap
@given(st.data(), heads(square=True), st.integers(1, 5), LIMITS, st.sampled_from(["tiled", "matrix_free", None]))
def test_attention_mass(
    data: st.DataObject, qk: tuple[Tensor, Tensor], iterations: int, limit: int | None, backend: str | None
) -> None:
    weights = data.draw(tensors(*qk[0].shape[:3])).abs()
    options: dict[str, Any] = {"iterations": iterations, "scale": data.draw(st.sampled_from([None, 0.3]))}
    if data.draw(st.booleans()):
        shape = [data.draw(st.sampled_from([1, n])) for n in qk[0].shape[:3]]
        options["bias"] = data.draw(tensors(*shape, qk[1].shape[2]))
        if data.draw(st.booleans()):
            options["bias"] = options["bias"] > data.draw(st.sampled_from([0.0, 100.0]))  # or a query sees nothing
    got = mass.attention_mass(*qk, weights, memory_limit=limit, backend=backend, **options)
    close(got, naive_mass.attention_mass(*qk, weights, **options))


@cheap
@given(st.data(), heads(square=True), LIMITS)
def test_attention_peak(data: st.DataObject, qk: tuple[Tensor, Tensor], limit: int | None) -> None:
    first = data.draw(st.integers(0, qk[0].shape[2] - 1))
    if not len(qk[0]):
        assert peak.attention_peak(*qk, first=first, memory_limit=limit).shape == (0, qk[1].shape[2])
        return
    close(peak.attention_peak(*qk, first=first, memory_limit=limit), naive_peak.attention_peak(*qk, first=first))


@cheap
@given(st.data(), heads(), LIMITS)
def test_attention_match(data: st.DataObject, qk: tuple[Tensor, Tensor], limit: int | None) -> None:
    (batch, _, tokens, _), keys = qk[0].shape, qk[1].shape[2]
    chosen = data.draw(st.permutations(range(keys)))[: data.draw(st.integers(1, keys))]
    columns = torch.tensor(chosen).expand(batch, -1)
    got = match.attention_match(*qk, columns, memory_limit=limit)
    assert got.shape == (batch, tokens)
    if batch:
        assert torch.equal(got, naive_match.attention_match(*qk, columns))


@cheap
@given(st.data(), heads())
def test_class_attention(data: st.DataObject, qk: tuple[Tensor, Tensor]) -> None:
    tokens = qk[0].shape[2]
    wanted = data.draw(st.integers(-tokens, tokens - 1) | st.slices(tokens).filter(lambda s: (s.step or 1) > 0))
    close(rows.class_attention(*qk, rows=wanted), naive_rows.class_attention(*qk, rows=wanted))


@cheap
@given(st.data(), st.integers(1, 3), SIDES, SIDES, st.integers(1, 5), LIMITS, st.none() | st.integers(0, 9))
def test_cosine_match(
    data: st.DataObject, batch: int, m: int, n: int, dim: int, limit: int | None, window: int | None
) -> None:
    a, b = data.draw(tensors(batch, m, dim)), data.draw(tensors(batch, n, dim))
    value, row = matching.cosine_match(a, b, window=window, memory_limit=limit)
    expected, others = naive_matching.cosine_match(a, b, window=window)
    close(value, expected)
    tied = torch.gather(cosines(a, b), 2, row.unsqueeze(-1)).squeeze(-1)
    close(tied, expected)  # of equals to the last bit the order is the product's
    assert ((row - others).abs() == 0).logical_or((tied - expected).abs() < 1e-12).all()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).transpose(1, 2)


@cheap
@given(st.data(), st.integers(1, 3), SIDES, SIDES, st.integers(1, 5), LIMITS, st.sampled_from(pairwise.METRICS))
def test_nearest(data: st.DataObject, batch: int, m: int, n: int, dim: int, limit: int | None, metric: str) -> None:
    a, b = data.draw(tensors(batch, m, dim)), data.draw(tensors(batch, n, dim))
    ranks = (torch.rand(batch, m), torch.rand(batch, n)) if data.draw(st.booleans()) else None
    value, row = pairwise.nearest(a, b, metric=metric, ranks=ranks, memory_limit=limit)
    expected, _ = naive_pairwise.nearest(a, b, metric=metric, ranks=ranks)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-6)
    assert ((row >= 0) & (row < n)).all()
    for image, own in (expected > -torch.inf).nonzero():  # of equals to the last bit the order is the product's
        found = naive_pairwise.closeness(a[image, own], b[image, row[image, own]], metric)
        torch.testing.assert_close(found, float(expected[image, own]), rtol=1e-7, atol=1e-6)
        assert ranks is None or ranks[1][image, row[image, own]] < ranks[0][image, own]


@cheap
@given(st.data(), st.lists(SIDES, max_size=4), st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_packed_attention(data: st.DataObject, lengths: list[int], count: int, dim: int, biased: bool) -> None:
    total = sum(lengths)
    q, k, v = (data.draw(tensors(total, count, dim)) for _ in range(3))
    bias = data.draw(tensors(total)) if biased else None
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    close(
        packed_attention.packed_attention(q, k, v, ends, key_bias=bias),
        naive_packed.packed_attention(q, k, v, lengths, key_bias=bias),
    )
