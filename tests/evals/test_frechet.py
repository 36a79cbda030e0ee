import numpy as np
import pytest
import scipy.linalg
import torch

from tokenprune.errors import TokenPruneError
from tokenprune.evals.frechet import Gaussian, bootstrap_frechet, frechet_distance, gaussian


def _random(dimension, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    mean = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return Gaussian(mean, factor @ factor.T)


def test_closed_form_of_diagonal_covariances():
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    shift = torch.tensor([1.0, -2.0, 3.0]).double()
    found = frechet_distance(Gaussian(torch.zeros(3).double(), first.diag()), Gaussian(shift, second.diag()))
    assert found == pytest.approx(14 + ((first.sqrt() - second.sqrt()) ** 2).sum().item())


@pytest.mark.parametrize("dimension", [1, 5, 64])
def test_equals_the_matrix_square_root_of_the_product(dimension):
    first, second = _random(dimension, 1), _random(dimension, 2)
    product = scipy.linalg.sqrtm((first.covariance @ second.covariance).numpy()).real
    expected = (first.mean - second.mean).square().sum() + np.trace(
        first.covariance.numpy() + second.covariance.numpy() - 2 * product
    )
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(float(expected), rel=1e-6)


def test_equal_sets_are_at_no_distance_even_where_the_covariance_is_singular():
    features = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(gaussian(features), gaussian(features)) == pytest.approx(0, abs=1e-5)


def test_moments_are_those_of_numpy_and_weights_repeat():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
    found = gaussian(features)
    np.testing.assert_allclose(found.mean, features.mean(0))
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T))
    weights = torch.arange(20) % 3
    repeated = gaussian(features.repeat_interleave(weights, dim=0))
    weighted = gaussian(features, weights)
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)
    with pytest.raises(TokenPruneError, match="at least two"):
        gaussian(features[:1])
    features[3, 1], features[5] = float("nan"), float("inf")
    with pytest.raises(TokenPruneError, match="features of 2 of 20 images are NaN"):
        gaussian(features)


def test_the_interval_holds_the_estimate_and_is_as_wide_as_repetitions_scatter():
    generator = torch.Generator().manual_seed(0)
    real = gaussian(torch.randn(4000, 8, generator=generator))
    sets = [0.2 + 1.1 * torch.randn(400, 8, generator=generator) for _ in range(60)]
    found, draws = bootstrap_frechet(sets[0], real)
    assert found.estimate == pytest.approx(frechet_distance(gaussian(sets[0]), real))
    assert found.low < found.estimate < found.high
    scatter = torch.tensor([frechet_distance(gaussian(one), real) for one in sets]).std()
    assert 0.6 < float(draws.std() / scatter) < 1.6


def test_sets_from_the_same_seeds_are_compared_in_pairs():
    generator = torch.Generator().manual_seed(0)
    real = gaussian(torch.randn(1000, 8, generator=generator))
    features = torch.randn(300, 8, generator=generator)
    worse = features + 0.2 * torch.randn(300, 8, generator=generator)
    (first, draws), (second, others) = bootstrap_frechet(features, real), bootstrap_frechet(worse, real)
    paired = (others - draws).std()
    assert second.estimate > first.estimate
    assert paired < 0.5 * (others[torch.randperm(200, generator=generator)] - draws).std()
    assert torch.equal(draws, bootstrap_frechet(features, real)[1])
