"""Saved 8-bit pixels keep the budget exactly, whatever the norm, size, change and mask."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dmsec_jax.core.pgd import Budget
from dmsec_jax.data import rounding

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@hypothesis.given(data=st.data(), shape=SHAPES, unit=st.sampled_from(["8bit", "01", "pm1"]), share=st.floats(0, 1.2))
def test_budget_and_mask_hold_in_integers(norm, data, shape, unit, share):
    pixels = data.draw(npst.arrays(np.uint8, shape))
    change = data.draw(npst.arrays(np.float32, shape, elements=st.floats(-400, 400, width=32)))
    mask = data.draw(npst.arrays(np.bool_, (*shape[:2], 1)))
    levels = share * (255 if norm == "linf" else 60 * np.sqrt(pixels.size))
    budget = Budget(levels / {"8bit": 1, "01": 255, "pm1": 127.5}[unit], unit)
    saved = rounding.apply_change(pixels, change, budget, norm, mask)
    difference = saved.astype(np.int64) - pixels
    assert saved.dtype == np.uint8
    assert (difference[~np.broadcast_to(mask, shape)] == 0).all()
    if norm == "linf":
        assert np.abs(difference).max() <= levels + 1e-6
    else:
        assert np.square(difference).sum() <= levels**2 * (1 + 1e-9) + 1e-6


def test_a_change_within_the_budget_is_rounded_to_nearest():
    change = np.random.default_rng(0).uniform(-8, 8, (20, 20, 3)).astype(np.float32)
    pixels = np.full(change.shape, 100, np.uint8)
    everywhere = np.ones((20, 20, 1), bool)
    saved = rounding.apply_change(pixels, change, Budget(8, "8bit"), "linf", everywhere)
    np.testing.assert_array_equal(saved.astype(int) - 100, np.rint(change))
    large = Budget(1e4, "8bit")
    np.testing.assert_array_equal(rounding.apply_change(pixels, change, large, "l2", everywhere), saved)


def test_a_small_euclidean_budget_is_used_up_rather_than_rounded_away():
    """Every sample would change by half a level: rounding all up doubles the norm, rounding all down leaves nothing."""
    change = np.full((30, 30, 3), 0.55, np.float32)
    pixels = np.full(change.shape, 100, np.uint8)
    radius = float(np.linalg.norm(change))
    saved = rounding.apply_change(pixels, change, Budget(radius, "8bit"), "l2", np.ones((30, 30, 1), bool))
    used = np.linalg.norm(saved.astype(float) - 100)
    assert 0.98 * radius <= used <= radius


def test_nan_is_an_error():
    change = np.full((2, 2, 1), np.nan, np.float32)
    with pytest.raises(ValueError, match="finite"):
        rounding.apply_change(
            np.zeros((2, 2, 1), np.uint8), change, Budget(1, "8bit"), "linf", np.ones((2, 2, 1), bool)
        )
