import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, sem, t
from stats import assert_mean

from dmsec_jax.metrics import extraction


def directions(count, width=16, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_planted_copies_are_found():
    members = directions(5)
    extracted = np.concatenate([directions(3, seed=1), members[::-1]])
    matches = extraction.best_matches(members, extracted)
    assert matches.index.tolist() == [7, 6, 5, 4, 3]
    assert extraction.average_similarity(matches.score) == 1
    assert extraction.success_rate(matches.score, 0.999) == 1


@given(st.integers(0, 10_000))
def test_rates_fall_with_the_threshold_and_more_pictures_never_match_worse(seed):
    members, everything = directions(6, seed=seed), directions(12, seed=seed + 1)
    some = extraction.best_matches(members, everything[:5]).score
    rates = [extraction.success_rate(some, tau) for tau in np.linspace(-1, 1, 21)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (1, 0)
    every = extraction.best_matches(members, everything).score
    assert extraction.average_similarity(every) >= extraction.average_similarity(some)


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = extraction.bootstrap_interval(trial, rng.normal(0.5, 0.1, 40), draws=400)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.87 <= hits / 200 <= 0.99


def share(count, of):
    return np.arange(of) < count


@pytest.mark.parametrize("count", [1, 4, 50])
def test_rates_of_all_or_nothing_keep_a_width(count):
    nothing, everything = (extraction.rate_interval(share(hits, count)) for hits in (0, count))
    assert (nothing.value, nothing.low, nothing.n) == (0, 0, count)
    assert (everything.value, everything.high, everything.n) == (1, 1, count)
    z2 = norm.ppf(0.975) ** 2
    assert nothing.high == pytest.approx(1 - everything.low) == pytest.approx(z2 / (count + z2))
    apart = extraction.rate_difference_interval(share(count, count), share(0, count))
    assert (apart.value, apart.high, apart.n) == (1, 1, 2 * count)
    assert apart.low == pytest.approx(1 - np.sqrt(2) * nothing.high)
    same = extraction.rate_difference_interval(share(0, count), share(0, count))
    assert (same.value, same.low, same.high) == pytest.approx((0, -nothing.high, nothing.high))


def test_rate_intervals_are_those_of_newcombes_tables():
    # Statistics in Medicine 17, 1998: page 861, method 3, and page 877, method 10
    assert extraction.rate_interval(share(81, 263))[:3] == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    for hits, null_hits, low, high in [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ]:
        found = extraction.rate_difference_interval(share(*hits), share(*null_hits))
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
        back = extraction.rate_difference_interval(share(*null_hits), share(*hits))
        assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))


@pytest.mark.slow  # compiles for long
def test_rate_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = []
    for rate, null_rate in rng.uniform(size=(1500, 2)):  # for one rate alone the share is a jagged function of it
        hits, null_hits = rng.random(20) < rate, rng.random(15) < null_rate
        one, two = extraction.rate_interval(hits), extraction.rate_difference_interval(hits, null_hits)
        covered.append((one.low <= rate <= one.high, two.low <= rate - null_rate <= two.high))
    assert_mean(covered, 0.95, resolution=0.03)


def test_rates_are_of_zeros_and_ones():
    with pytest.raises(ValueError, match="hits must be zeros and ones, got other values; compare the scores"):
        extraction.rate_interval([0.0, 0.5])
    with pytest.raises(ValueError, match="not empty"):
        extraction.rate_interval([])


def test_seed_interval_is_students():
    values = np.array([0.4, 0.5, 0.7, 0.6])
    interval = extraction.seed_interval(values)
    low, high = t.interval(0.95, 3, loc=values.mean(), scale=sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert (interval.value, interval.n) == pytest.approx((0.55, 4))


def test_one_value_alone_says_nothing_about_its_spread():
    for interval in (extraction.seed_interval([0.3]), extraction.bootstrap_interval(0, [0.3])):
        assert interval == extraction.Interval(0.3, -np.inf, np.inf, 1)


def test_holdouts_are_the_null():
    members, holdouts = directions(8), directions(8, seed=1)
    extracted = np.concatenate([members, directions(20, seed=2)])
    found = extraction.summarise(0, members, extracted, (0.7, 0.95), holdouts=holdouts)
    assert found.average.value == 1
    assert found.rates[0.95].value == 1
    assert found.holdout_rates[0.95].value == 0
    assert found.difference.value == pytest.approx(found.average.value - found.holdout_average.value)
    assert found.difference.low > 0
    assert found.rates[0.95] == extraction.rate_interval(np.ones(8))
    assert found.rate_differences[0.95] == extraction.rate_difference_interval(np.ones(8), np.zeros(8))


def test_holdouts_alike_give_an_interval_around_zero():
    found = extraction.summarise(0, directions(30), directions(40, seed=2), (0.7,), holdouts=directions(30, seed=1))
    assert found.difference.low < 0 < found.difference.high


def test_without_holdouts_there_is_no_null():
    found = extraction.summarise(0, directions(3), directions(4, seed=1), (0.7,))
    assert found.difference is None
    assert found.average.n == 3


def test_non_finite_pictures_are_refused_not_averaged():
    broken = directions(4)
    broken[2] = np.nan
    with pytest.raises(ValueError, match=r"extracted must be finite, got 1 rows .*; leave out the pictures flagged"):
        extraction.best_matches(directions(3), broken)
    with pytest.raises(ValueError, match=r"scores must be finite, got 1 of 2 not"):
        extraction.average_similarity([0.5, np.inf])


def test_features_of_two_networks_are_refused():
    with pytest.raises(ValueError, match=r"extracted must be \[E, 16\], got shape \(4, 8\); embed both"):
        extraction.best_matches(directions(3), directions(4, width=8))
