"""Comparisons against values worked out by hand, and claims only where there is an effect."""

import math

import numpy as np
import pytest
from matrix_world import table
from scipy import stats

from benchmarks.matrix import statistics
from benchmarks.matrix.statistics import FAMILY, Comparison, compare, corrected, differences

NAMES = ("AS_finextract", "treatment", "advdm", "clean")


def test_one_set_is_the_paired_t_test():
    gaps = np.array([0.1, 0.3, 0.2, 0.4, 0.0])  # mean 0.2, variance 0.025, standard error sqrt(0.005)
    found = compare({"a": gaps}, *NAMES)
    assert found.mean == pytest.approx(0.2)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    half = 2.7764451 * math.sqrt(0.005)  # t of 4 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert found.effect == pytest.approx(0.2 / math.sqrt(0.025))
    assert (found.sets_low, found.sets_high, found.n, found.sets) == (None, None, 5, 1)


def test_sets_count_alike_and_their_seeds_tell_the_error():
    # means 1 and 3; variances of the means 1/3 and 4/3, of which a quarter each: error^2 = 5/12
    found = compare({"a": np.array([0.0, 1.0, 2.0]), "b": np.array([1.0, 3.0, 5.0])}, *NAMES)
    assert found.mean == pytest.approx(2)
    df = (1 / 12 + 4 / 12) ** 2 / ((1 / 12) ** 2 / 2 + (4 / 12) ** 2 / 2)  # Satterthwaite
    assert found.p == pytest.approx(2 * stats.t.sf(2 / math.sqrt(5 / 12), df))
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(5 / 12))
    assert found.effect == pytest.approx(2 / math.sqrt((1 + 4) / 2))  # pooled variance within sets
    over = 12.7062047 * math.sqrt(2) / math.sqrt(2)  # t of 1 degree of freedom; means 1 and 3
    assert (found.sets_low, found.sets_high) == pytest.approx((2 - over, 2 + over))


def test_differences_that_do_not_vary():
    assert compare({"a": np.zeros(5)}, *NAMES).p == 1
    same = compare({"a": np.full(5, 0.5)}, *NAMES)
    assert same.p == pytest.approx(2 / 2**5)
    assert same.effect is None


def test_one_seed_says_nothing():
    assert compare({"a": np.array([0.4])}, *NAMES) is None


def test_pairs_share_all_but_the_choice_and_are_averaged_within_a_seed():
    identity = {"set": "a", "n0": 5, "steps": 150, "objective": "plain"}
    rows = [
        identity | {"seed": 0, "tuner": "full", "treatment": "clean", "AS": 0.5},
        identity | {"seed": 0, "tuner": "full", "treatment": "advdm", "AS": 0.1},
        identity | {"seed": 0, "tuner": "lora", "treatment": "clean", "AS": 0.9},
        identity | {"seed": 0, "tuner": "lora", "treatment": "advdm", "AS": 0.7},
        identity | {"seed": 1, "tuner": "lora", "treatment": "advdm", "AS": 0.7},  # its partner is missing
        identity
        | {"n0": 10, "seed": 0, "tuner": "full", "treatment": "clean", "AS": 0.4},  # the five are among the ten
        identity | {"n0": 10, "seed": 0, "tuner": "full", "treatment": "advdm", "AS": 0.4},
    ]
    found = differences(rows, "AS", "treatment", "advdm", "clean")
    assert found == {"a": pytest.approx([-0.2])}


def test_holm_is_over_the_family():
    blank = Comparison(
        *NAMES, mean=0, low=0, high=0, sets_low=None, sets_high=None, p=0, holm=0, effect=None, n=5, sets=1
    )
    found = corrected([blank._replace(p=p) for p in (0.01, 0.04, 0.03)])
    assert [one.holm for one in found] == pytest.approx([0.03, 0.06, 0.06])
    assert [one.told for one in found] == [True, False, False]


def test_only_what_has_an_effect_is_told():
    found = statistics.all_comparisons(table(FAMILY))
    told = {(one.knob, one.level, one.reference) for one in found if one.told}
    assert told == {("treatment", "advdm", "clean"), ("treatment", "advdm", "noise")}
    assert len(found) == len(FAMILY) * (3 + 1 + 1), (  # nothing here is purified
        "noise and AdvDM over clean, AdvDM over noise; one objective, one tuner"
    )


def test_without_any_effect_claims_are_as_rare_as_promised():
    flat = lambda seed: [one for one in table(FAMILY, noise=1.0, seed=seed) if one["treatment"] != "advdm"]
    claims = sum(any(one.told for one in statistics.all_comparisons(flat(seed))) for seed in range(40))
    assert claims <= 6, "one in twenty runs; seven of forty would happen once in 300 times"


def test_rows_for_result_files_are_tidy():
    rows = [statistics.result_row(one) for one in statistics.all_comparisons(table(FAMILY))]
    first = rows[0]
    assert (first.metric, first.method) == ("AS_finextract difference", "noise")
    assert {"knob", "reference", "holm", "effect"} <= first.case.keys()
