"""What `benchmarks.corruption` concludes from curves, on curves whose dip and gap are known."""

import numpy as np
import pytest

from benchmarks.corruption import _differences, at_equal, dip

RNG = np.random.default_rng(0)


def noisy(curve, samples=32):
    return np.asarray(curve)[:, None] + RNG.normal(size=(len(curve), samples))


def test_a_dip_has_its_depth_and_noise_alone_has_none():
    falls = np.array([dip(noisy([0.0, 2.0, 0.0, 1.0])) for _ in range(200)])
    assert abs(falls.mean() - 2) < 5 * falls.std() / np.sqrt(200)
    flat = np.array([dip(noisy(np.zeros(6))) for _ in range(400)])
    assert abs(flat.mean()) < 5 * flat.std() / np.sqrt(400)
    rising = np.array([dip(noisy([0.0, 2.0, 4.0])) for _ in range(50)])
    assert rising.mean() < -1, "the smallest rise of a curve that only rises"


def test_curves_are_compared_where_both_have_been():
    fidelity = {"plain": [0.0, 0.5, 1.0], "bayes": [0.8, 0.2, 0.4]}  # in any order
    value = {"plain": [0.0, 0.5, 1.0], "bayes": [0.6, 0.0, 0.2]}  # 0.2 below plain's everywhere
    np.testing.assert_allclose(at_equal(fidelity, value, "bayes"), -0.2)
    apart = {"plain": [0.0, 0.5, 1.0], "bayes": [1.2, 1.5, 2.0]}
    assert at_equal(apart, value, "bayes") is None


def test_differences_are_paired_by_seed():
    names = {"metric": "fidelity", "unit": "cosine", "case": {"steps": 25}}
    values = {("plain", 0): 0.1, ("plain", 1): 0.5, ("bayes-norm", 0): 0.2, ("bayes-norm", 1): 0.7}
    results = [{**names, "method": method, "seed": seed, "value": value} for (method, seed), value in values.items()]
    (row,) = _differences(results)
    assert (row.metric, row.method, row.n) == ("fidelity difference", "bayes-norm", 2)
    assert row.value == pytest.approx(0.15)
