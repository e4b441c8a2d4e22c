"""Bayesian linear regression three ways: our step, NumPyro's SVI with AutoNormal, and the mean-field optimum in closed form.

A network that predicts a clean picture of one pixel as x . w has the loss (x . w - y)^2, whatever t and noise are. With Gaussian noise of
variance s^2 on N pictures, J with kl_scale="sum" and kl_weight = 2 s^2 / N is then -2 s^2 / N times the ELBO, up to a constant.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from stats import assert_mean

from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.finetune.adapters import full
from dmsec_jax.finetune.examples import Data, examples
from dmsec_jax.methods import bayes_dm
from dmsec_jax.methods.bayes_dm import Config

PICTURES, WEIGHTS, NOISE, PRIOR = 8, 3, 0.5, 0.7
RUNS, STEPS, PARTICLES, RATE = 128, 4000, 4, 5e-3
RESOLUTION = 0.02
RNG = np.random.default_rng(0)
X = RNG.normal(size=(PICTURES, WEIGHTS)).astype(np.float32)
X[:, 1] += X[:, 0]  # correlated, so that the mean-field posterior is not the exact one
Y = (X @ [1.0, -0.5, 0.3] + NOISE * RNG.normal(size=PICTURES)).astype(np.float32)
CENTRE = np.array([0.2, 0.0, -0.1], np.float32)  # the "pretrained" weights


def closed_form():
    """Mean and deviations of the Gaussian with independent coordinates that is nearest to the posterior in KL(Q || P)."""
    precision = X.T @ X / NOISE**2 + np.eye(WEIGHTS) / PRIOR**2
    mean = np.linalg.solve(precision, X.T @ Y / NOISE**2 + CENTRE / PRIOR**2)
    return mean, 1 / np.sqrt(np.diag(precision))


def eps_fn(params, z_t, t, context):
    return jnp.broadcast_to((context[:, 0] @ params["w"])[:, None, None, None], z_t.shape)


def ours(key):
    cfg = Config(
        num_steps=STEPS,
        batch_size=PICTURES,
        learning_rate=RATE,
        weight_decay=0.0,
        clip_norm=1e9,
        sample_posterior=False,
        selection=("w",),
        sigma0=PRIOR,
        sigma_rate=RATE,
        kl_weight=2 * NOISE**2 / PICTURES,
        kl_scale="sum",
        weight_samples=PARTICLES,
    )
    data = Data(examples(jnp.asarray(Y)[:, None, None, None], jnp.asarray(X)[:, None]))
    network = {"eps_fn": eps_fn, "adapter": full(), "schedule": ScheduleConfig(prediction_type="sample")}
    state, _ = bayes_dm.run(key, data, {"w": jnp.asarray(CENTRE)}, cfg, **network)
    return state.tuned.trainable["w"], state.raw["w"]


def svi(key):
    def model():
        weights = numpyro.sample("w", dist.Normal(jnp.asarray(CENTRE), PRIOR).to_event(1))
        numpyro.sample("y", dist.Normal(X @ weights, NOISE).to_event(1), obs=jnp.asarray(Y))

    guide = AutoNormal(model, init_loc_fn=numpyro.infer.init_to_value(values={"w": jnp.asarray(CENTRE)}))
    learner = SVI(model, guide, numpyro.optim.Adam(RATE), Trace_ELBO(num_particles=PARTICLES))
    state, _ = jax.lax.scan(lambda state, _: learner.update(state), learner.init(key), None, STEPS)
    found = learner.get_params(state)
    return found["w_auto_loc"], found["w_auto_scale"]


@pytest.mark.slow  # compiles for long
@pytest.mark.parametrize("fit", [ours, svi])
def test_both_find_the_mean_field_optimum(fit):
    """Many runs with keys of their own, so that their ends are independent draws."""
    mean, deviation = jax.jit(jax.vmap(fit))(jax.random.split(jax.random.key(0), RUNS))
    exact_mean, exact_deviation = closed_form()
    assert np.abs(exact_mean - CENTRE).max() > 10 * RESOLUTION
    assert np.abs(exact_deviation - PRIOR).min() > 10 * RESOLUTION
    assert_mean(mean, exact_mean, resolution=RESOLUTION)
    assert_mean(deviation, exact_deviation, resolution=RESOLUTION)
