"""Evidence: hand-made cases, oracles from scikit-learn and SciPy, and honesty at small samples by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from stats import assert_mean

from dmsec_jax.metrics import evidence

numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)  # few values, so many ties


@given(numbers, numbers)
def test_curve_and_area_are_those_of_scikit_learn(scores, null):
    labels = np.repeat([1, 0], [len(scores), len(null)])
    wanted = metrics.roc_auc_score(labels, scores + null)
    assert evidence.auc(scores, null).value == pytest.approx(wanted)
    curve = evidence.roc(scores, null)
    false_positive, true_positive, _ = metrics.roc_curve(labels, scores + null, drop_intermediate=False)
    np.testing.assert_allclose(curve.false_positive, false_positive)
    np.testing.assert_allclose(curve.true_positive, true_positive)


@given(numbers, numbers)
def test_intervals_hold_their_value_and_stay_in_range(scores, null):
    for found in (evidence.auc(scores, null), evidence.auc_newcombe(scores, null)):
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high > found.low


def test_rate_counts_ties_as_one_step():
    found = evidence.rate_at([3, 2, 2, 1], [2, 1, 1, 0], 0.25)
    assert (found.hits, found.total, found.false_hits, found.null_total, found.threshold) == (3, 4, 1, 4, 2.0)
    none_allowed = evidence.rate_at([3, 2, 2, 1], [2, 1, 1, 0], 0.01)
    assert (none_allowed.hits, none_allowed.false_hits, none_allowed.threshold) == (1, 0, 3.0)
    nothing = evidence.rate_at([0.0], [1.0], 0.01)
    assert (nothing.hits, nothing.threshold) == (0, math.inf)


@given(numbers, numbers, st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_transferred_threshold_and_p_value_decide_alike(scores, null, level):
    over = np.asarray(scores) > evidence.transferred_threshold(null, level)
    np.testing.assert_array_equal(over, evidence.p_values(scores, null) <= level + 1e-12)


@given(numbers, numbers, numbers)
def test_a_transferred_threshold_is_never_better_than_the_oracle(scores, null, calibration):
    assert evidence.transferred_accuracy(scores, null, calibration) <= evidence.oracle_accuracy(scores, null) + 1e-12


@pytest.mark.parametrize(("count", "bias"), [(2, 0.707), (4, 0.669), (10, 0.617), (50, 0.558), (200, 0.530)])
def test_oracle_accuracy_of_noise_is_the_known_bias(count, bias):
    rng = np.random.default_rng(count)
    draws = [evidence.oracle_accuracy(*rng.normal(size=(2, count))) for _ in range(2000)]
    assert_mean(draws, bias, resolution=0.02)


@pytest.mark.parametrize("count", [5, 10, 20, 50])
def test_false_positive_rate_holds_at_small_samples(count):
    """Nothing was trained on: every rejection is false."""
    rng = np.random.default_rng(count)
    level = 0.2
    single, whole, family = [], [], []
    for trial in range(400):
        scores, null = rng.normal(size=3), rng.normal(size=count)
        p = evidence.p_values(scores, null)
        single.append(p[0] <= level)
        whole.append(evidence.set_evidence(trial, scores, null, draws=200).p_value <= level)
        family.append((evidence.holm(p) <= level).any())
    for rejected in (single, whole, family):
        share, error = np.mean(rejected), np.std(rejected) / np.sqrt(len(rejected))
        assert share <= level + 4 * max(error, 0.01)
    assert np.mean(whole) >= level - 4 * 0.02  # and it does reject


def test_p_values_of_unused_pictures_are_uniform():
    rng = np.random.default_rng(0)
    p = [float(evidence.p_values(rng.normal(size=1), rng.normal(size=99))[0]) for _ in range(2000)]
    assert stats.kstest(np.array(p) - 0.005 * rng.uniform(size=2000) * 2, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("interval", [evidence.auc, evidence.auc_newcombe], ids=["delong", "newcombe"])
@pytest.mark.parametrize(("count", "shift"), [(10, 1.0), (20, 1.0), (50, 0.5)])
def test_coverage_of_the_area(interval, count, shift):
    truth = stats.norm.cdf(shift / np.sqrt(2))
    rng = np.random.default_rng(count)
    covered = []
    for _ in range(600):
        found = interval(rng.normal(shift, 1, count), rng.normal(0, 1, count))
        covered.append(found.low <= truth <= found.high)
    share = np.mean(covered)
    assert share >= 0.95 - 4 * np.sqrt(0.95 * 0.05 / 600) - 0.01  # both are approximate; a bad one is far below


def test_bootstrap_agrees_with_delong_on_many_pictures():
    rng = np.random.default_rng(1)
    scores, null = rng.normal(0.7, 1, 300), rng.normal(0, 1, 200)
    boot, delong = evidence.auc_bootstrap(0, scores, null), evidence.auc(scores, null)
    assert boot.value == delong.value
    assert abs(boot.low - delong.low) < 0.01
    assert abs(boot.high - delong.high) < 0.01


def test_paired_difference_of_areas():
    rng = np.random.default_rng(2)
    scores, null = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    same = evidence.auc_difference(scores, null, scores, null)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    noisy = lambda values: values + rng.normal(0, 1.5, len(values))
    found = evidence.auc_difference(scores, null, noisy(scores), noisy(null))
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="same pictures"):
        evidence.auc_difference(scores, null, scores[:3], null)


def test_a_set_that_stands_out_is_found_and_small_sets_are_exact():
    found = evidence.set_evidence(0, [5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert found.exact
    assert found.permutations == 20
    assert found.p_value == pytest.approx(1 / 20)
    assert found.difference == pytest.approx(4.0)


def test_adjustments_against_worked_examples():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(evidence.holm(p), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(evidence.benjamini_hochberg(p), [0.02, 0.04, 0.04, 0.02])


def test_scoring_of_recoveries():
    similarity = np.array([[0.2, 0.9], [0.1, 0.8]])
    np.testing.assert_array_equal(evidence.paired_scores(similarity), [0.2, 0.8])
    np.testing.assert_array_equal(evidence.best_of_split(similarity), [0.9, 0.8])


@pytest.mark.parametrize("bad", [[], [[1.0]], [np.nan], [np.inf]])
def test_bad_scores_are_refused(bad):
    for function in (evidence.roc, evidence.auc, evidence.p_values, evidence.oracle_accuracy):
        with pytest.raises(ValueError, match="scores must be"):
            function(bad, [0.0])
        with pytest.raises(ValueError, match="null must be"):
            function([0.0], bad)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="false_positive_rate"):
        evidence.rate_at([1.0], [0.0], 1.5)
    with pytest.raises(ValueError, match="level"):
        evidence.transferred_threshold([0.0], 0.0)
    with pytest.raises(ValueError, match="p must be in"):
        evidence.holm([0.5, 1.5])
    with pytest.raises(ValueError, match="pictures x recoveries"):
        evidence.paired_scores(np.zeros((2, 3)))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_set_of_one_is_judged_by_its_rank(sign):
    many, one = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.5])
    found = evidence.set_evidence(0, one, many) if sign == 1 else evidence.set_evidence(0, -many, -one)
    assert (found.p_value, found.exact, found.permutations) == (2 / 5, True, 5)
    assert found.difference == pytest.approx(1.0)
