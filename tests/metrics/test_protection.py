"""The rise of a loss beyond random noise, judged over pictures."""

import numpy as np
import pytest
from scipy import stats

from dmsec_jax.metrics.protection import rise


def test_rise_is_the_paired_difference_relative_to_clean():
    clean, noise = np.array([1.0, 2.0, 4.0]), np.array([1.1, 2.0, 4.4])
    changed = noise + np.array([0.3, 0.5, 1.6])
    found, p_value = rise(clean, changed, noise)
    assert found.value == pytest.approx((0.3 + 0.25 + 0.4) / 3)
    assert found.low < found.value < found.high
    assert p_value == pytest.approx(stats.ttest_rel(changed / clean, noise / clean, alternative="greater").pvalue)


def test_chance_is_found_significant_as_often_as_the_level_says():
    rng = np.random.default_rng(0)
    draws = 600
    hits = [rise(np.ones(8), *rng.normal(1, 0.1, (2, 8)))[1] < 0.05 for _ in range(draws)]
    assert abs(np.mean(hits) - 0.05) < 5 * np.sqrt(0.05 * 0.95 / draws)


def test_one_picture_proves_nothing():
    found, p_value = rise([1.0], [2.0], [1.0])
    assert found.value == 1
    assert np.isnan(p_value)
