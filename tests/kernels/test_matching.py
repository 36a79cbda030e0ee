import pytest
import torch

from tokenprune.kernels.matching import cosine_match
from tokenprune.kernels.matching.reference import cosine_match as naive


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 5, 1, 4), (2, 1, 5, 4), (3, 17, 23, 8)], ids=str)
def test_matches_the_formula(shape: tuple[int, int, int, int]) -> None:
    batch, rows, others, dim = shape
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(batch, rows, dim, generator=generator, dtype=torch.float64)
    b = torch.randn(batch, others, dim, generator=generator, dtype=torch.float64)
    value, row = cosine_match(a, b)
    expected_value, expected_row = naive(a, b)
    torch.testing.assert_close(value, expected_value)
    assert torch.equal(row, expected_row)


def test_ties_go_to_the_lower_row() -> None:
    a = torch.tensor([[[1.0, 0.0]]])
    b = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [5.0, 0.0]]])
    assert cosine_match(a, b)[1].tolist() == [[1]]


def test_no_rows_match_nothing() -> None:
    value, row = cosine_match(torch.zeros(2, 0, 3), torch.ones(2, 4, 3))
    assert value.shape == row.shape == (2, 0)
