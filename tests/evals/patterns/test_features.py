"""CKA, PWCCA and Procrustes: what does not change them, other ways to compute them, and examples worked by hand."""

import math

import pytest
import scipy.linalg
import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.patterns.features import linear_cka, procrustes, pwcca

MEASURES = (linear_cka, procrustes, pwcca)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.fixture
def pair():
    """Features of 60 images that have something in common: 5 and 7 channels of uneven variance."""
    first = draw(0, 60, 5) * torch.tensor([5.0, 2, 1, 1, 0.3])
    return first, first @ draw(1, 5, 7) + draw(2, 60, 7)


def rotation(size, seed=3):
    return torch.linalg.qr(draw(seed, size, size)).Q


@pytest.mark.parametrize("measure", MEASURES)
def test_rotation_shift_and_isotropic_scale_change_nothing(measure, pair):
    first, second = pair
    value = measure(first, second)
    assert 0.2 < value < 0.98, "a value at the end of the range could hide a change"
    assert measure(first, 3 * second @ rotation(7) - 40) == pytest.approx(value)
    assert measure(0.01 * first + 5, second) == pytest.approx(value)
    assert measure(first, first @ rotation(5) * 9 + 1) == pytest.approx(1)
    assert measure(first, draw(9, 60, 5)) < 0.5


@pytest.mark.parametrize("measure", [linear_cka, procrustes])
def test_rotation_of_the_first_changes_nothing_and_order_neither(measure, pair):
    first, second = pair
    assert measure(first @ rotation(5), second) == pytest.approx(measure(first, second))
    assert measure(second, first) == pytest.approx(measure(first, second))
    stretched = second * torch.tensor([9.0, 1, 1, 1, 1, 1, 0.1])
    assert abs(measure(first, stretched) - measure(first, second)) > 0.01


def test_any_invertible_map_of_the_second_leaves_pwcca(pair):
    first, second = pair
    assert pwcca(first, second @ draw(4, 7, 7)) == pytest.approx(pwcca(first, second))
    assert pwcca(first, first @ draw(4, 5, 5)) == pytest.approx(1)


def test_cka_equals_the_kernels_of_all_pairs_of_images(pair):
    kernels = []
    for features in pair:
        kernel = [[float(sum(a * b)) for b in features] for a in features]
        total, means = sum(map(sum, kernel)) / 3600, [sum(row) / 60 for row in kernel]
        kernels.append([[k - means[i] - means[j] + total for j, k in enumerate(row)] for i, row in enumerate(kernel)])

    def aligned(one, other):
        return sum(a * b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))

    expected = aligned(*kernels) / math.sqrt(aligned(kernels[0], kernels[0]) * aligned(kernels[1], kernels[1]))
    assert linear_cka(*pair) == pytest.approx(expected)


def test_procrustes_is_what_the_best_rotation_leaves(pair):
    first, second = (features - features.mean(0) for features in pair)
    padded = torch.cat([first, torch.zeros(60, 2)], 1)  # a rotation needs as many channels on both sides
    padded, second = padded / padded.norm(), second / second.norm()
    best, _ = scipy.linalg.orthogonal_procrustes(padded.numpy(), second.numpy())
    left = float((padded @ torch.from_numpy(best) - second).square().sum())
    assert 2 - 2 * procrustes(*pair) == pytest.approx(left)


def test_pwcca_equals_canonical_correlations_from_qr(pair):
    first, second = (features - features.mean(0) for features in pair)
    q_first, q_second = (scipy.linalg.qr(features.numpy(), mode="economic")[0] for features in (first, second))
    u, correlations, _ = scipy.linalg.svd(q_first.T @ q_second, full_matrices=False)
    variates = torch.from_numpy(q_first @ u)
    weights = [sum(abs(float(variate @ channel)) for channel in first.T) for variate in variates.T]
    expected = sum(w * c for w, c in zip(weights, correlations, strict=True)) / sum(weights)
    assert pwcca(*pair) == pytest.approx(expected)


def test_worked_by_hand():
    # Four images at the corners of a square; of the second only the first axis is known, and a third one is noise.
    first = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    second = torch.tensor([[1.0], [1], [-1], [-1]])
    assert linear_cka(first, second) == pytest.approx(1 / math.sqrt(2))  # |4|^2 over |(4, 4)| |4|
    assert procrustes(first, second) == pytest.approx(1 / math.sqrt(2))  # 4 over sqrt(8) sqrt(4)
    assert pwcca(first, second) == pytest.approx(1)  # the one direction there is agrees
    unrelated = torch.tensor([[1.0], [-1], [-1], [1]])
    for measure in MEASURES:
        assert measure(first, unrelated) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_weights_are_repetitions(measure, pair):
    first, second = pair
    times = torch.randint(4, (60,), generator=torch.Generator().manual_seed(5))
    repeated = (features.repeat_interleave(times, 0) for features in pair)
    assert measure(first, second, times) == pytest.approx(measure(*repeated))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_direction_without_variance_and_features_without_any(measure, pair):
    first, second = pair
    again = torch.cat([first, first[:, :1], torch.full((60, 1), 3.0)], 1)
    assert measure(again, again) == pytest.approx(1)
    assert math.isnan(measure(torch.ones(60, 3), second))


def test_pwcca_of_few_images_is_refused():
    with pytest.raises(TokenPruneError, match="take 6 or"):
        pwcca(draw(0, 5, 5), draw(1, 5, 3))
