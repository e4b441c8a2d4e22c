"""Guidance identities, and a guided model whose distribution is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import guidance, multistep, samplers, schedule
from dmsec_jax.diffusion.schedule import ScheduleConfig

CFG = ScheduleConfig(set_alpha_to_one=True)
ALPHA_BAR = schedule.alpha_bars(CFG)
Z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
T = jnp.array([10, 500, 900])


def gaussian(mean, var):
    def model_fn(z_t, t):
        alpha, sigma = schedule.levels(ALPHA_BAR, t, z_t)
        return sigma * (z_t - alpha * mean) / (alpha**2 * var + sigma**2)

    return model_fn


COND, UNCOND = gaussian(1.0, 0.2), gaussian(0.0, 1.0)


def test_mix_is_the_weighted_sum(strict):
    got = guidance.mix((COND, UNCOND), (2.5, -0.5))(Z, T)
    np.testing.assert_allclose(got, 2.5 * COND(Z, T) - 0.5 * UNCOND(Z, T), rtol=1e-5, atol=1e-6)
    both = lambda z_t, t: (COND(z_t, t), UNCOND(z_t, t))
    np.testing.assert_array_equal(guidance.mix_outputs(both, (2.5, -0.5), 2)(Z, T), got)
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        guidance.mix((COND, UNCOND), (1.0,))


def test_classifier_free_identities():
    np.testing.assert_allclose(guidance.classifier_free(COND, UNCOND, 1.0)(Z, T), COND(Z, T), atol=1e-6)
    np.testing.assert_allclose(guidance.classifier_free(COND, UNCOND, 0.0)(Z, T), UNCOND(Z, T), atol=1e-6)
    np.testing.assert_allclose(guidance.classifier_free(COND, COND, 7.5)(Z, T), COND(Z, T), atol=1e-5)


def test_a_sweep_of_weights_is_a_batch_axis():
    weights = jnp.array([0.0, 1.0, 4.0])
    per_example = guidance.classifier_free(COND, UNCOND, weights)(Z, T)
    swept = jax.jit(jax.vmap(lambda w: guidance.classifier_free(COND, UNCOND, w)(Z, T)))(weights)
    assert swept.shape == (3, *Z.shape)
    for i, weight in enumerate([0.0, 1.0, 4.0]):
        fixed = guidance.classifier_free(COND, UNCOND, weight)(Z, T)
        np.testing.assert_allclose(swept[i], fixed, atol=1e-5)
        np.testing.assert_allclose(per_example[i], fixed[i], atol=1e-5)


def test_extrapolation_recovers_the_distribution_that_was_mixed_in():
    """tuned = (1 - lam) base + lam q in noise predictions; base + (tuned - base) / lam is q, and samples are q's."""
    lam, q = 0.25, gaussian(2.0, 0.1)
    tuned = guidance.mix((UNCOND, q), (1 - lam, lam))
    recovered = guidance.classifier_free(tuned, UNCOND, 1 / lam)
    np.testing.assert_allclose(recovered(Z, T), q(Z, T), atol=1e-5)
    sampler = multistep.dpmpp_2m(CFG, 30, spacing="karras")
    a = ALPHA_BAR[sampler.timesteps[0]]
    z_T = 2.0 * jnp.sqrt(a) + jnp.sqrt(0.1 * a + 1 - a) * jax.random.normal(jax.random.key(1), (2, 5000))
    run = jax.jit(lambda z: samplers.sample(jax.random.key(2), z, sampler, model_fn=recovered))
    z = np.asarray(run(z_T))
    assert z.mean() == pytest.approx(2.0, abs=0.02)
    assert z.var() == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("phi", [0.0, 0.6, 1.0])
def test_rescaling_moves_the_deviation_toward_the_conditional_one(phi):
    mixed = guidance.classifier_free(COND, UNCOND, 6.0)(Z, T)
    got = guidance.classifier_free_rescaled(COND, UNCOND, 6.0, phi)(Z, T)
    deviation = lambda x: np.asarray(x).reshape(3, -1).std(axis=1, ddof=1)
    expected = (1 - phi) * deviation(mixed) + phi * deviation(COND(Z, T))
    np.testing.assert_allclose(deviation(got), expected, rtol=1e-4)


def test_percentile_threshold_by_hand():
    x0 = jnp.array([[0.5, -0.25, 0.1, 0.0, 0.3], [1.0, -2.0, 3.0, 4.0, -10.0]])
    got = np.asarray(guidance.percentile_threshold(x0, 0.75))  # |x0| sorted in the second row: 1 2 3 4 10, so s = 4
    np.testing.assert_allclose(got[0], x0[0])
    np.testing.assert_allclose(got[1], [0.25, -0.5, 0.75, 1.0, -1.0], rtol=1e-6)
    limited = guidance.percentile_threshold(x0, 0.75, limit=2.0)
    np.testing.assert_allclose(limited[1], [0.5, -1.0, 1.0, 1.0, -1.0], rtol=1e-6)


def test_std_threshold_is_per_example():
    x0 = jnp.array([[0.1, -0.1, 0.2], [2.0, -2.0, 4.0]])
    got = np.asarray(guidance.std_threshold(x0))
    np.testing.assert_allclose(got[0], x0[0])
    np.testing.assert_allclose(got[1], np.asarray(x0[1]) / np.std([2.0, -2.0, 4.0], ddof=1), rtol=1e-6)


def test_thresholds_are_hooks_of_samplers():
    z_T = jax.random.normal(jax.random.key(1), (2, 50))
    wide = gaussian(0.0, 9.0)

    def run(hook):
        return np.asarray(samplers.sample(jax.random.key(2), z_T, samplers.ddim(CFG, 20), model_fn=wide, x0_fn=hook))

    assert np.abs(run(samplers.identity)).max() > 3
    assert np.abs(run(functools.partial(guidance.percentile_threshold, percentile=0.9))).max() <= 1 + 1e-5
    assert run(guidance.std_threshold).std(axis=1, ddof=1).max() <= 1 + 1e-5
