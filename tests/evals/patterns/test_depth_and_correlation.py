"""Maps of depth and coefficients against loops and scipy, and examples worked by hand."""

import math

import pytest
import scipy.stats
import torch

from tokenprune.evals.patterns.correlation import kendall, pearson, spearman
from tokenprune.evals.patterns.depth import emd, js, kl, similarity, survival

GRID = (3, 4)


def maps(seed, count=3):
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 7


def shares(values):
    return [value / sum(values) for value in values]


def test_survival_counts_images():
    depth = torch.tensor([[0, 1, 3], [2, 1, 3]])
    assert survival(depth, 3).tolist() == [[0.5, 1, 1], [0.5, 0, 1], [0, 0, 1]]
    assert survival(depth, 3).sum(0).tolist() == depth.double().mean(0).tolist()


def naive_kl(first, second):
    pairs = zip(shares(first), shares(second), strict=True)
    return sum(p * math.log2(p / q) for p, q in pairs if p > 0)


def naive_similarity(first, second):
    least = [[value - min(values) for value in values] for values in (first, second)]
    return sum(min(p, q) for p, q in zip(shares(least[0]), shares(least[1]), strict=True))


def test_divergences_equal_loops():
    first, second = maps(0), maps(1)
    for row, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        mean = [(p + q) / 2 for p, q in zip(shares(one), shares(other), strict=True)]
        assert float(kl(first, second)[row]) == pytest.approx(naive_kl(one, other))
        assert float(js(first, second)[row]) == pytest.approx((naive_kl(one, mean) + naive_kl(other, mean)) / 2)
        assert float(similarity(first, second)[row]) == pytest.approx(naive_similarity(one, other))


def test_divergences_worked_by_hand():
    half, quarter = torch.tensor([2.0, 2, 0, 0]), torch.tensor([1.0, 1, 1, 1])
    assert float(kl(half, quarter)) == pytest.approx(1)  # log2 of (1/2) / (1/4)
    assert float(kl(quarter, half)) == math.inf
    assert float(js(half, torch.tensor([0.0, 0, 5, 1]))) == pytest.approx(1)  # nothing in common
    assert float(similarity(half, torch.tensor([0.0, 0, 5, 1]))) == 0
    assert math.isnan(float(similarity(half, quarter)))
    assert float(similarity(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 3]))) == pytest.approx(1 / 3 + 1 / 2)
    for measure in (kl, js):
        assert float(measure(half, 3 * half)) == pytest.approx(0)


def test_earth_is_moved_by_the_shortest_way():
    first = torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    second = torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    # Half goes three columns along the first row, half to the other corner of the grid of 3 x 4.
    assert emd(first, second, GRID) == pytest.approx((3 + math.hypot(2, 3)) / 2)
    assert emd(first, 2 * first, GRID) == 0
    assert emd(second, first, GRID) == pytest.approx(emd(first, second, GRID))


@pytest.mark.parametrize("seed", range(3))
def test_earth_movers_distance_equals_scipys_over_all_places(seed):
    first, second = maps(seed, 1)[0], maps(seed + 10, 1)[0]
    places = [[row, column] for row in range(3) for column in range(4)]
    expected = scipy.stats.wasserstein_distance_nd(places, places, first.numpy(), second.numpy())
    assert emd(first, second, GRID) == pytest.approx(expected)


def test_coefficients_equal_scipys_row_by_row():
    first, second = maps(4), maps(5)
    second[0, :6] = 2.0  # equal values
    for row in range(3):
        one, other = first[row].numpy(), second[row].numpy()
        assert float(pearson(first, second)[row]) == pytest.approx(scipy.stats.pearsonr(one, other).statistic)
        assert float(spearman(first, second)[row]) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)


def test_coefficients_worked_by_hand():
    order, other = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 8, 2, 100])
    assert float(spearman(order, other)) == pytest.approx(0.8)  # 1 - 6 * (1 + 1) / (4 * 15)
    assert kendall(order, other) == pytest.approx(4 / 6)  # one pair of six is the wrong way round
    assert float(pearson(order, 3 - 2 * order)) == pytest.approx(-1)
    noisy = torch.tensor([0.1 + 0.2, 0.3, 5, 6], dtype=torch.double)  # 0.30000000000000004 first: a tie
    assert float(spearman(order, noisy)) == pytest.approx(scipy.stats.spearmanr([1, 2, 3, 4], [1, 1, 2, 3]).statistic)
    assert kendall(order, noisy) == pytest.approx(scipy.stats.kendalltau([1, 2, 3, 4], [1, 1, 2, 3]).statistic)
    constant = torch.full((4,), 0.1, dtype=torch.double)
    assert all(math.isnan(float(of(order, constant))) for of in (pearson, spearman, kendall))
