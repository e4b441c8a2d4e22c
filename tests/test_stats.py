import numpy as np
import pytest
import stats

RNG = np.random.default_rng(0)
DRAWS = RNG.normal(2.0, 1.0, size=(10_000, 3))


def autoregressive(rho, count=200_000):
    """x_i = rho x_{i-1} + noise; its effective sample size is count (1 - rho) / (1 + rho)."""
    noise = RNG.normal(size=count)
    chain = np.zeros(count)
    for i in range(1, count):
        chain[i] = rho * chain[i - 1] + noise[i]
    return chain


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_a_known_chain(rho):
    chain = autoregressive(rho)
    np.testing.assert_allclose(stats.effective_sample_size(chain), len(chain) * (1 - rho) / (1 + rho), rtol=0.1)


@pytest.mark.parametrize(
    ("draws", "expected"), [(np.ones(50), 1), (np.array([3.0]), 1), (np.array([0.0, 1] * 50), 100)]
)
def test_effective_sample_size_stays_between_one_and_the_count(draws, expected):
    assert stats.effective_sample_size(draws) == expected


def test_a_true_mean_passes():
    stats.assert_mean(DRAWS, 2.0, resolution=0.1)
    stats.assert_mean(DRAWS, [2.0, 2.0, 2.0], resolution=0.1)
    stats.assert_mean(autoregressive(0.9), 0.0, resolution=0.3, independent=False)


@pytest.mark.parametrize(
    ("draws", "options", "message"),
    [
        (DRAWS + 0.1, {}, "standard errors"),
        (DRAWS + np.array([0, 0, 0.1]), {}, "coordinate 2"),
        (DRAWS[:50], {"resolution": 9}, "only 50 effective draws, need 100"),
        (DRAWS[:200], {}, "draw more"),
        (np.repeat(DRAWS[:90], 100, axis=0), {"independent": False, "resolution": 9}, "effective draws"),
        (np.full((500, 1), np.nan), {}, "NaN"),
    ],
)
def test_what_must_fail_fails(draws, options, message):
    with pytest.raises(AssertionError, match=message):
        stats.assert_mean(draws, 2.0, **({"resolution": 0.1} | options))
