import math
import statistics

import pytest
import torch

from tokenprune.evals.stats import bootstrap_mean, bootstrap_median, bootstrap_share


def naive_interval(values, statistic, seed, resamples, level=0.95):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), (resamples, len(values)), generator=generator).tolist()
    draws = sorted(statistic([values[i] for i in row]) for row in index)

    def quantile(share):
        place = share * (len(draws) - 1)
        below = int(place)
        above = min(below + 1, len(draws) - 1)
        return draws[below] + (place - below) * (draws[above] - draws[below])

    return statistic(values), quantile((1 - level) / 2), quantile((1 + level) / 2)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize(("ours", "plain"), [(bootstrap_mean, statistics.mean), (bootstrap_median, statistics.median)])
def test_equals_a_plain_bootstrap(count, ours, plain):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).tolist()
    got = ours(values, seed=3, resamples=400)
    assert (got.estimate, got.low, got.high) == pytest.approx(naive_interval(values, plain, 3, 400))


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(300):
        sample = (torch.rand(120, generator=generator) < 0.8).double()
        interval = bootstrap_mean(sample, seed=trial, resamples=300)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_equal_answers_do_not_claim_certainty():
    reach = 1 - 0.025 ** (1 / 40)
    for value, support, low, high in (
        (1.0, (0, 1), 1 - reach, 1.0),
        (0.0, (0, 1), 0.0, reach),
        (0.0, (-1, 1), -reach, reach),
        (0.3, None, 0.3, 0.3),
    ):
        interval = bootstrap_mean([value] * 40, support=support)
        assert (interval.estimate, interval.low, interval.high) == pytest.approx((value, low, high))
    mixed = [0.0] * 39 + [1.0]
    assert bootstrap_mean(mixed, support=(0, 1)) == bootstrap_mean(mixed)


def test_groups_are_drawn_whole():
    values = torch.tensor([1.0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    groups = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 9, 0, 0, 0])
    whole = bootstrap_mean(values, groups=groups, seed=1)
    by_group = bootstrap_mean([0.0, 0.0, 1.0, 1.0], seed=1)
    assert (whole.estimate, whole.low, whole.high) == (by_group.estimate, by_group.low, by_group.high)
    assert whole.high - whole.low > bootstrap_mean(values, seed=1).high - bootstrap_mean(values, seed=1).low
    uneven = bootstrap_mean([1.0, 1, 1, 0], groups=torch.tensor([0, 0, 0, 1]))
    assert uneven.estimate == 0.75


def test_empty_sample_is_nan():
    assert str(bootstrap_mean([]).estimate) == "nan"


def test_seed_decides_and_global_rng_is_untouched():
    values = torch.rand(50, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert torch.equal(before, torch.get_rng_state())


def test_resampling_in_slices_uses_the_memory_limit(monkeypatch):
    shapes = []
    original = torch.randint

    def spy(high, size, **options):
        shapes.append(size)
        return original(high, size, **options)

    monkeypatch.setattr(torch, "randint", spy)
    bootstrap_mean(torch.rand(50_000, generator=torch.Generator().manual_seed(0)), resamples=200)
    assert sum(rows for rows, _ in shapes) == 200
    assert max(rows * columns for rows, columns in shapes) <= 4_000_000


def test_a_share_is_that_of_pairs_drawn_together():
    generator = torch.Generator().manual_seed(4)
    reference = (torch.rand(30, generator=generator) < 0.8).double()
    values = torch.where(torch.rand(30, generator=generator) < 0.2, 1 - reference, reference)
    pairs = list(zip(values.tolist(), reference.tolist(), strict=True))

    def share(drawn):
        return sum(value for value, _ in drawn) / sum(base for _, base in drawn)

    got = bootstrap_share(values, reference, seed=3, resamples=400)
    assert (got.estimate, got.low, got.high) == pytest.approx(naive_interval(pairs, share, 3, 400))
    assert got.high - got.low < bootstrap_mean(values, seed=3).high - bootstrap_mean(values, seed=3).low + 0.1


def test_a_share_of_groups_draws_whole_groups():
    values, reference = torch.tensor([1.0, 0, 1, 1, 0, 0]), torch.tensor([1.0, 1, 1, 1, 1, 0])
    groups = torch.tensor([7, 7, 3, 3, 5, 5])
    sums = [(2.0, 2.0), (0.0, 1.0), (1.0, 2.0)]  # groups 3, 5 and 7

    def share(drawn):
        return sum(value for value, _ in drawn) / sum(base for _, base in drawn)

    got = bootstrap_share(values, reference, groups=groups, seed=1, resamples=300)
    assert (got.estimate, got.low, got.high) == pytest.approx(naive_interval(sums, share, 1, 300))


def test_a_share_without_a_difference_is_not_certain():
    same = torch.tensor([1.0, 1.0, 0.0, 1.0] * 10)
    got = bootstrap_share(same, same)
    reach = 1 - 0.025 ** (1 / 40)
    assert (got.estimate, got.low, got.high) == pytest.approx((1.0, 1 - reach / 0.75, 1 + reach / 0.75))


@pytest.mark.parametrize("values", [torch.zeros(20), torch.ones(20), torch.zeros(0)])
def test_there_is_no_share_of_nothing(values):
    got = bootstrap_share(values, torch.zeros_like(values))
    assert all(math.isnan(number) for number in (got.estimate, got.low, got.high))
