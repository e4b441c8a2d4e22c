"""Set distances against closed forms: Gaussians with known parameters, kernels written out, sets on a line."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from dmsec_jax.metrics.distribution import frechet_distance, kernel_distance, precision_recall


def with_moments(rng, count, mean, covariance):
    """[count, D] whose sample mean and covariance are exactly those given."""
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_is_closed_form():
    rng = np.random.default_rng(0)
    a, b = (m @ m.T + 0.1 * np.eye(4) for m in rng.normal(size=(2, 4, 4)))
    mean_a, mean_b = rng.normal(size=(2, 4))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    value = frechet_distance(with_moments(rng, 50, mean_a, a), with_moments(rng, 70, mean_b, b))
    np.testing.assert_allclose(value, expected, rtol=1e-8)


def test_frechet_of_isotropic_gaussians():
    rng = np.random.default_rng(1)
    x = with_moments(rng, 30, np.zeros(3), np.eye(3))
    np.testing.assert_allclose(frechet_distance(x, 2 * x + 1), 3 * (2 - 1) ** 2 + 3, rtol=1e-10)


def test_frechet_with_fewer_pictures_than_features_agrees_with_the_matrix_root():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 20)), rng.normal(size=(9, 20)) * 2
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = linalg.eigh(a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(linalg.eigvalsh(root @ b @ root), 0)).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * cross
    np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-5)


def test_frechet_of_a_set_with_itself_is_zero_and_it_is_symmetric():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 8)), rng.normal(size=(25, 8)) + 0.3
    assert frechet_distance(x, x) < 1e-10
    assert frechet_distance(x, x[::-1]) < 1e-10
    np.testing.assert_allclose(frechet_distance(x, y), frechet_distance(y, x), rtol=1e-10)


@given(st.integers(0, 2**31), st.integers(3, 12), st.integers(3, 12), st.integers(1, 6))
def test_frechet_does_not_see_rotations(seed, n, m, d):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    np.testing.assert_allclose(frechet_distance(x @ q, y @ q), frechet_distance(x, y), rtol=1e-6, atol=1e-8)


def test_kernel_distance_is_the_written_out_estimate():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(8, 3)) + 0.5
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    order = np.random.default_rng(7)
    x_, y_ = x[order.permutation(10)], y[order.permutation(8)]
    blocks = []
    for s in (slice(0, 4), slice(4, 8)):
        xb, yb = x_[s], y_[s]
        within = sum(k(p[i], p[j]) for p in (xb, yb) for i in range(4) for j in range(4) if i != j) / 12
        blocks.append(within - 2 * sum(k(a, b) for a in xb for b in yb) / 16)
    result = kernel_distance(x, y, block_size=100, seed=7)
    assert (result.blocks, result.block_size) == (2, 4)
    np.testing.assert_allclose(result.value, np.mean(blocks), rtol=1e-10)
    np.testing.assert_allclose(result.standard_error, abs(blocks[0] - blocks[1]) / 2, rtol=1e-8)


def test_kernel_distance_is_unbiased_and_its_error_bar_is_honest():
    rng = np.random.default_rng(5)
    draws = [kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)), block_size=10) for _ in range(150)]
    values = np.array([d.value for d in draws])
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(150)
    assert 0.8 < np.mean([d.standard_error for d in draws]) / values.std() < 1.2
    shifted = kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 1, block_size=10)
    assert shifted.value > 10 * values.std()


def test_precision_recall_of_identical_and_of_distant_sets():
    x = np.random.default_rng(6).normal(size=(30, 5))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_precision_recall_on_a_line():
    real = np.arange(10.0)[:, None]  # every ball of k = 1 has radius 1: covers [-1, 10]
    generated = np.array([[0.5], [3.5], [10.5], [20.0], [20.5]])
    # generated balls: 0.5 -> 3, 3.5 -> 3, 10.5 -> 7, 20 and 20.5 -> 0.5; together they cover [-2.5, 6.5], [3.5, 17.5], [19.5, 21]
    assert precision_recall(real, generated, neighbours=1) == (2 / 5, 1.0)
    half = np.array([[0.0], [1.0], [2.0]])
    assert precision_recall(real, half, neighbours=1) == (1.0, 4 / 10)


def test_precision_recall_does_not_depend_on_the_chunk(monkeypatch):
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(50, 2)), rng.normal(size=(40, 2)) * 1.5
    whole = precision_recall(x, y)
    monkeypatch.setattr("dmsec_jax.metrics.distribution.ROWS", 7)
    assert precision_recall(x, y) == whole
    assert 0 < whole.precision < 1


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_bad_features_are_named(metric):
    good = np.random.default_rng(9).normal(size=(8, 3))
    with pytest.raises(ValueError, match=r"generated must be \[N, D\] with at least"):
        metric(good, good[:1])
    with pytest.raises(ValueError, match=r"generated must be \[M, 3\]"):
        metric(good, good[:, :2])
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 8 rows not"):
        metric(bad, good)
