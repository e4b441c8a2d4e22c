"""Rows of data from the model of `sem`, with noise that need not be Gaussian and mechanisms that need not be linear.

    linear    X_j = sum_i weights[i, j] X_i + e_j
    mlp       X_j = sum_h out[j, h] tanh(sum_i in[i, j, h] weights[i, j] X_i) + e_j

The errors are e = L u with omega = L L^T and u of zero mean and unit variance: their covariance is the linear model's, whatever their shape.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int8
from numpyro import handlers

from dmsec_jax.causal import sem
from dmsec_jax.causal.sem import Knowledge, Prior, Sem
from dmsec_jax.core.types import Key

Noise = Literal["gaussian", "laplace", "uniform", "exponential"]
Mechanism = Literal["linear", "mlp"]
HIDDEN_UNITS = 8


class Rows(NamedTuple):
    data: Float[Array, "N V"]
    marks: Int8[Array, "V V"]


def model(
    size: int, num_rows: int, prior: Prior, noise: Noise, mechanism: Mechanism, knowledge: Knowledge | None = None
) -> Sem:
    """The sites of `sem.structure`, of the mechanism, and `exogenous` and `data`."""
    drawn = sem.structure(size, prior, knowledge)
    total = len(drawn.weights)
    with numpyro.plate("rows", num_rows):
        exogenous = numpyro.sample("exogenous", _standard(noise).expand([total]).to_event(1))
    errors = (exogenous - _mean(noise)) @ jnp.linalg.cholesky(drawn.omega).T
    if mechanism == "linear":
        data = errors @ jnp.linalg.inv(jnp.eye(total) - drawn.weights)
    else:
        data = _through(_mlp(drawn.weights), errors)
    numpyro.deterministic("data", data[:, :size])
    return drawn


def simulate(
    key: Key,
    size: int,
    num_rows: int,
    prior: Prior,
    noise: Noise = "gaussian",
    mechanism: Mechanism = "linear",
    knowledge: Knowledge | None = None,
    given: dict[str, Any] | None = None,
) -> Rows:
    """Rows and the graph to be learnt from them; arguments as `sem.simulate`."""
    seeded = handlers.seed(handlers.condition(model, data=given or {}), key)
    sites = handlers.trace(seeded).get_trace(size, num_rows, prior, noise, mechanism, knowledge)
    return Rows(sites["data"]["value"], sites["marks"]["value"])


def _standard(noise):
    """Of unit variance."""
    return {
        "gaussian": dist.Normal(0.0, 1.0),
        "laplace": dist.Laplace(0.0, 2**-0.5),
        "uniform": dist.Uniform(-(3**0.5), 3**0.5),
        "exponential": dist.Exponential(1.0),
    }[noise]


def _mean(noise):
    return 1.0 if noise == "exponential" else 0.0


def _mlp(weights):
    """data [N, T] -> what the mechanisms make of it [N, T]."""
    total = len(weights)
    units = dist.Normal(0.0, 1.0)
    into = numpyro.sample("in", units.expand([total, total, HIDDEN_UNITS]).to_event(3)) * weights[:, :, None]
    out = numpyro.sample("out", units.expand([total, HIDDEN_UNITS]).to_event(2))
    return lambda data: jnp.einsum("njh,jh->nj", jnp.tanh(jnp.einsum("ni,ijh->njh", data, into)), out)


def _through(mechanism, errors):
    """The fixed point X = f(X) + e of an acyclic system: after as many rounds as the longest path has vertices."""
    return jax.lax.fori_loop(0, errors.shape[1], lambda _, data: mechanism(data) + errors, errors)
