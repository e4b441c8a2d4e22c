"""Features of pairs against partial correlations by regression, and on data that have none."""

import jax
import numpy as np
import pytest

from dmsec_jax.causal import features

FEATURES = jax.jit(features.pair_features)
ROWS = 100


def some_data(seed=0, rows=ROWS, size=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, size)) @ (np.eye(size) + np.triu(rng.normal(size=(size, size)) * 0.5, 1))


def strength(data, i, j, given):
    """log(1 + |z|) of the correlation of residuals."""
    rest = np.column_stack([np.ones(len(data)), data[:, given]])
    left = data[:, [i, j]] - rest @ np.linalg.lstsq(rest, data[:, [i, j]], rcond=None)[0]
    r = np.corrcoef(left.T)[0, 1]
    return np.log1p(np.sqrt(len(data) - len(given) - 3) * abs(np.arctanh(r)))


def test_orders_by_regression():
    data = some_data()
    found = np.asarray(FEATURES(features.correlation(data), ROWS))
    assert found.shape == (7, 7, features.COUNT)
    link = np.full((7, 7), -np.inf)
    for i in range(7):
        for j in range(7):
            if i == j:
                continue
            others = [k for k in range(7) if k not in (i, j)]
            ones = [strength(data, i, j, [k]) for k in others]
            link[i, j] = min(strength(data, i, j, []), *ones)
            assert found[i, j, 0] == pytest.approx(strength(data, i, j, []), abs=2e-3)
            expected = [np.mean(ones), np.std(ones), min(ones), max(ones)]
            assert found[i, j, [2, 3, 4, 9]] == pytest.approx(expected, abs=5e-3)
            # all six others are likely neighbours here, so sets of two are all pairs of others, once from i and once from j
            twos = [strength(data, i, j, [k, m]) for k in others for m in others if k < m]
            assert found[i, j, 10] == pytest.approx(np.mean(twos), abs=5e-3)
            assert found[i, j, [12, 17]] == pytest.approx([min(twos), max(twos)], abs=5e-3)
    for i, j in ((0, 1), (5, 2)):
        best = sorted(max(link[a, b] for b in range(7) if b not in (i, j)) for a in (i, j))
        assert found[i, j, [19, 18]] == pytest.approx(best, abs=5e-3)


def test_full_order_is_that_of_regression_up_to_its_shrinkage():
    data = some_data(rows=5000)
    found = np.asarray(FEATURES(features.correlation(data), 5000))
    for i, j in ((0, 1), (2, 6)):
        expected = strength(data, i, j, [k for k in range(7) if k not in (i, j)])
        assert found[i, j, 1] == pytest.approx(expected, abs=0.05)


def test_names_do_not_matter():
    corr = features.correlation(some_data(1))
    order = np.random.default_rng(2).permutation(7)
    found = np.asarray(FEATURES(corr, ROWS))
    np.testing.assert_allclose(FEATURES(corr[np.ix_(order, order)], ROWS), found[np.ix_(order, order)], atol=2e-3)
    off = ~np.eye(7, dtype=bool)
    np.testing.assert_allclose(found[off], found.transpose(1, 0, 2)[off], atol=2e-3)


def test_fewer_rows_than_variables_and_equal_columns_are_finite():
    few = some_data(3, rows=5)
    twice = some_data(4)
    twice[:, 6] = twice[:, 0]
    twice[:, 5] = -2 * twice[:, 1]
    for data in (few, twice):
        assert np.isfinite(FEATURES(features.correlation(data), len(data))).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :2], "V >= 3"),
        (lambda x: x[:4], "N >= 5"),
        (lambda x: np.where(np.arange(7) == 2, np.nan, x), "NaN or infinity in c"),
        (lambda x: np.where(np.arange(7) == 3, 5.0, x), "constant d"),
    ],
)
def test_what_cannot_be_correlated_is_refused(change, message):
    data = change(some_data())
    with pytest.raises(ValueError, match=message):
        features.correlation(data, list("abcdefg"[: data.shape[1]]))


@pytest.mark.parametrize("size", [1, 2, 5, 8, 130])
def test_the_network_sorts_columns_with_ties_and_infinities(size):
    values = np.random.default_rng(0).integers(0, 4, (size, 2, 3)).astype(np.float32)
    values[1:, 0, 0] = np.inf
    np.testing.assert_array_equal(jax.jit(features._sorted)(values), np.sort(values, axis=0))
