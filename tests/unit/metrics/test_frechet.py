"""The Fréchet distance: its value, and that it does not depend on how the features were cut up."""

import numpy as np
import pytest
import scipy.linalg
import torch
from glann.errors import UserError
from glann.metrics.frechet import FeatureMoments, frechet_distance


def gaussian_features(rng, count, dim):
    mix = rng.standard_normal((dim, dim))
    return rng.standard_normal((count, dim)) @ mix + rng.standard_normal(dim) * 3


@pytest.fixture
def rng(record_property):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    record_property("seed", seed)
    print("seed", seed)
    return np.random.default_rng(seed)


def exact(mean, covariance, count=1000):
    """Moments whose mean and covariance are exactly these."""
    return FeatureMoments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def test_equals_the_closed_form_for_commuting_covariances(rng):
    basis, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    variance_a, variance_b = rng.uniform(0.1, 5, 7), rng.uniform(0.1, 5, 7)
    mean_a, mean_b = rng.standard_normal(7), rng.standard_normal(7)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(variance_a) - np.sqrt(variance_b)) ** 2).sum()
    a, b = exact(mean_a, (basis * variance_a) @ basis.T), exact(mean_b, (basis * variance_b) @ basis.T)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_equals_the_published_formula_with_an_independent_matrix_root(rng):
    x, y = gaussian_features(rng, 400, 13), gaussian_features(rng, 301, 13)
    covariance_x, covariance_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(covariance_x + covariance_y - 2 * root)
    assert frechet_distance(FeatureMoments.of(x), FeatureMoments.of(y)) == pytest.approx(expected, rel=1e-8)


def test_is_zero_for_the_same_features_and_symmetric(rng):
    x, y = FeatureMoments.of(gaussian_features(rng, 50, 9)), FeatureMoments.of(gaussian_features(rng, 60, 9))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * np.trace(x.covariance_FF()))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_fewer_images_than_features_is_exact_too(rng):
    """Rank-deficient covariances, in whose product sqrtm finds imaginary parts.

    The nonzero spectrum is that of a small matrix of inner products, which serves as the reference.
    """
    x, y = rng.standard_normal((5, 40)), rng.standard_normal((7, 40))
    centred_x, centred_y = (x - x.mean(0)) / 2, (y - y.mean(0)) / np.sqrt(6)
    cross = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum()
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + (centred_x**2).sum() + (centred_y**2).sum() - 2 * cross
    assert frechet_distance(FeatureMoments.of(x), FeatureMoments.of(y)) == pytest.approx(expected, rel=1e-10)


def test_streaming_and_merging_equal_one_pass(rng):
    """Uneven batches (also empty ones), two workers, features far from zero: no digit is lost."""
    x = gaussian_features(rng, 237, 11) + 1e4
    workers = [FeatureMoments.empty(11), FeatureMoments.empty(11)]
    for number, batch in enumerate(np.split(x, [1, 2, 50, 50, 113, 230])):
        workers[number % 2] = workers[number % 2].update(batch, torch.arange(len(batch)))
    merged = workers[0].merge(workers[1])
    assert merged.count == 237
    np.testing.assert_allclose(merged.mean_F, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance_FF(), np.cov(x, rowvar=False), rtol=1e-7, atol=1e-6)


def test_torch_features_are_taken_in_float64():
    x = torch.tensor([[1.0], [3.0]])
    assert FeatureMoments.of(x).covariance_FF().item() == 2.0
    assert FeatureMoments.of(x).mean_F.dtype == np.float64


def test_nan_one_image_and_mixed_extractors_are_refused():
    with pytest.raises(UserError, match="NaN"):
        FeatureMoments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(FeatureMoments.of(np.ones((1, 3))), FeatureMoments.of(np.ones((5, 3))))
    with pytest.raises(UserError, match="one extractor for both"):
        frechet_distance(FeatureMoments.of(np.ones((4, 3))), FeatureMoments.of(np.ones((4, 2))))
