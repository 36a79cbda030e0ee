import pytest
import torch
from kernel_inputs import error, rows
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tokenprune import TokenPruneError
from tokenprune.kernels.matching import cosine_match, eager
from tokenprune.kernels.matching.reference import cosine_match as naive


def formula(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, row = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).max(-1)
    return value, row


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 1, 4), (2, 1, 5, 4), (3, 17, 23, 8)], ids=str)
@pytest.mark.parametrize("window", [None, 0, 2, 100])
@pytest.mark.parametrize("cached", [1, 2**9, 2**21])
def test_matches_the_formula(
    shape: tuple[int, int, int, int], window: int | None, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    batch, count, others, dim = shape
    a, b = rows(batch, count, dim).double(), rows(batch, others, dim, seed=1).double()
    value, row = cosine_match(a, b, window=window)
    expected_value, expected_row = naive(a, b, window=window)
    torch.testing.assert_close(value, expected_value)
    assert torch.equal(row, expected_row)


@pytest.mark.parametrize("tokens", [2, 63, 197, 257, 1025])
@pytest.mark.parametrize("cached", [2**12, 2**21])
def test_every_blocking_finds_the_same_rows(tokens: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    a, b = rows(3, tokens // 2, 64), rows(3, tokens - tokens // 2, 64, seed=1)
    value, row = cosine_match(a, b)
    expected_value, expected_row = formula(a, b)
    torch.testing.assert_close(value, expected_value)
    assert torch.equal(row, expected_row)


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize("cached", [2**12, 2**21])
def test_a_window_hides_what_is_outside(window: int, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    a, b = rows(2, 150, 32), rows(2, 211, 32, seed=1)
    similarity = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)
    far = (torch.arange(211) - (torch.arange(150) * 211 // 150)[:, None]).abs() > window
    expected_value, expected_row = similarity.masked_fill(far, -2.0).max(-1)
    value, row = cosine_match(a, b, window=window)
    torch.testing.assert_close(value, expected_value)
    assert torch.equal(row, expected_row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(dtype: torch.dtype) -> None:
    a, b = rows(2, 128, 64).to(dtype), rows(2, 129, 64, seed=1).to(dtype)
    exact, exact_row = formula(a.double(), b.double())
    value, row = cosine_match(a, b)
    plain, plain_row = formula(a, b)
    assert value.dtype == torch.float32
    assert error(value, exact) <= 2 * error(plain, exact)
    assert (row != exact_row).sum() <= (plain_row != exact_row).sum()


@pytest.mark.parametrize("cached", [2**14, 2**21])
def test_ties_go_to_the_lower_row(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    assert cosine_match(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [2.0, 0.0], [5.0, 0.0]]]))[1] == 1
    a, b = rows(2, 100, 64), rows(2, 130, 64, seed=1)
    twice = torch.cat([b, b], 1)
    assert torch.equal(cosine_match(a, twice)[1], cosine_match(a, b)[1])
    assert (cosine_match(a, torch.ones_like(b))[1] == 0).all()


def test_rows_without_length_match_nothing_and_everything() -> None:
    a, b = torch.zeros(1, 2, 3), torch.eye(3)[None]
    value, row = cosine_match(a, b)
    assert (value == 0).all()
    assert (row == 0).all()
    assert cosine_match(b, torch.zeros(1, 4, 3))[0].eq(0).all()
    value, row = cosine_match(torch.zeros(2, 0, 3), torch.ones(2, 4, 3))
    assert value.shape == row.shape == (2, 0)


def test_nan_stays_in_its_image_and_gives_valid_rows() -> None:
    a, b = rows(3, 20, 8), rows(3, 30, 8, seed=1)
    expected = cosine_match(a, b)
    b[1, 7, 2] = float("nan")
    a[2, 3, 0] = float("nan")
    value, row = cosine_match(a, b)
    assert value[1].isnan().all()
    assert value[2].isnan().tolist() == [i == 3 for i in range(20)]
    assert ((row >= 0) & (row < 30)).all()
    for got, right in zip((value, row), expected, strict=True):
        assert torch.equal(got[0], right[0])


@pytest.mark.parametrize("window", [None, 5])
def test_batch_mates_change_not_a_bit(window: int | None) -> None:
    a, b = rows(9, 63, 20), rows(9, 64, 20, seed=1)
    together = cosine_match(a, b, window=window)
    for part in (slice(0, 1), slice(3, 7), slice(8, 9)):
        for got, right in zip(cosine_match(a[part], b[part], window=window), together, strict=True):
            assert torch.equal(got, right[part])


def test_the_limit_is_kept() -> None:
    a, b = rows(4, 300, 8), rows(4, 310, 8, seed=1)
    for limit in (2**14, 2**16, 2**18):
        largest = 0

        class Products(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                if func is torch.ops.aten.bmm.out:
                    largest = max(largest, out.untyped_storage().nbytes())
                return out

        with Products():
            eager.cosine_match(a, b, None, limit)
        assert limit // 4 <= largest <= limit


def test_the_operator_is_well_formed_and_counted() -> None:
    a, b = rows(2, 10, 4).contiguous(), rows(2, 12, 4, seed=1).contiguous()
    torch.library.opcheck(torch.ops.tokenprune.cosine_match.default, (a, b, -1, 2**20, ""))
    for window, others in ((None, 12), (2, 5)):
        with FlopCounterMode(display=False) as counter:
            cosine_match(a, b, window=window)
        assert counter.get_total_flops() == 2 * 2 * 10 * others * 4


def test_a_match_carries_no_gradient() -> None:
    a = rows(2, 10, 4).requires_grad_()
    assert not cosine_match(a, a)[0].requires_grad


def test_autocast_does_not_round_the_similarity() -> None:
    a, b = rows(2, 63, 16), rows(2, 64, 16, seed=1)
    expected = cosine_match(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine_match(a, b)[0], expected[0])


def test_what_cannot_be_is_refused() -> None:
    a = torch.ones(2, 3, 4)
    for b, message in ((torch.ones(2, 3, 5), "do not fit"), (torch.ones(2, 0, 4), "N > 0")):
        with pytest.raises(TokenPruneError, match=message):
            cosine_match(a, b)
    with pytest.raises(TokenPruneError, match="window=-3"):
        cosine_match(a, a, window=-3)
    with pytest.raises(TokenPruneError, match="TRITON_INTERPRET"):
        cosine_match(a, a, backend="triton")


@pytest.mark.parametrize("cached", [2**14, 2**21])
def test_of_many_columns_the_first_of_equals_wins_too(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CACHED", cached)
    a, b = rows(2, 37, 16), rows(2, 4 * eager.GROUP, 16, seed=1)
    b[:, 300:] = b[:, 88:300]  # each of these is there twice, in other groups and in one
    b[:, 1] = b[:, 0]
    a[0, 5] = 0.0
    value, row = cosine_match(a, b)
    expected = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)
    torch.testing.assert_close(value, expected.amax(-1))
    assert (row < 300).all()
    assert (row != 1).all()
    assert row[0, 5] == 0
    assert torch.equal(row, cosine_match(a.double(), b.double())[1])
    b[1, 200, 3] = float("nan")
    value, spoilt = cosine_match(a, b)
    assert torch.equal(spoilt[0], row[0])
    assert value[1].isnan().all()
    assert ((spoilt >= 0) & (spoilt < b.shape[1])).all()
