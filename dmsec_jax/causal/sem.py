"""One probabilistic model of graphs with hidden causes, of their mechanisms and of the data: to simulate, to condition, to infer.

    X_j = sum_i weights[i, j] X_i + e_j,   Cov(e) = omega,   Sigma = (I - W)^-T Omega (I - W)^-1

Sites, for T vertices (V seen ones, then the hidden) and their P = T (T - 1) / 2 pairs (i, j), i < j, row by row:

    family, position [T], edges_per_vertex     the family of the skeleton and its shape (`families`)
    priority [T]                               i comes before j where it is lower
    adjacent [P], confounded [P]               an edge on the pair; turned into i <-> j
    weight_unit [P], omega_unit [P]            in (-1, 1): sign and quantile of the coefficient
    noise_unit [T] or [1]                      quantile of the noise variance
    cov_tril [V, V]                            Cholesky factor of the sample covariance (`gaussian`), or
    exogenous [N, T], data [N, V]              rows, with any noise and mechanism (`rows`)
    marks [V, V]                               what is to be learnt: the maximal ancestral graph (deterministic)

Uses: `simulate` under `vmap` inside a training step, where N rows of Gaussian data cost no more than one Wishart matrix; `given` with the sites of
a graph (`graph_sites`) for data like those of one graph; `Knowledge` for required, forbidden and tiered edges; `coefficients` for NUTS over
coefficients of a fixed graph. Coefficients are one continuous site each, signs included, so that a fixed graph leaves nothing discrete.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Int8
from numpyro import handlers, infer

from dmsec_jax.causal import families, graphs, projection
from dmsec_jax.causal.families import Family
from dmsec_jax.core.config import config
from dmsec_jax.core.types import AnyArray, Key


@config
class Prior:
    """Ranges are of uniform distributions, drawn anew for every graph.

    edges: per vertex.
    confounding: "converted": a share of the edges becomes i <-> j, as in SPOT's public code; "hidden": there are variables more, which come
        early, have edges like others, and are not seen.
    confounded: that share.
    seen_per_hidden: how many seen variables come to one hidden.
    weight, omega: absolute coefficients and error covariances; weight_scale: uniform in themselves or in their logarithm.
    noise: variance, before the dominance of the diagonal that makes omega positive definite; noise_of: one for all vertices or one for each.
    """

    families: tuple[Family, ...] = ("er", "scale-free", "sbm", "small-world")
    edges: tuple[float, float] = (0.8, 3.0)
    confounding: Literal["converted", "hidden"] = "converted"
    confounded: tuple[float, float] = (0.0, 0.25)
    seen_per_hidden: int = 8
    weight: tuple[float, float] = (0.05, 2.0)
    weight_scale: Literal["uniform", "log-uniform"] = "log-uniform"
    omega: tuple[float, float] = (0.1, 0.7)
    noise: tuple[float, float] = (0.2, 1.5)
    noise_of: Literal["all", "each"] = "each"


SPOT = Prior(
    families=("er",),
    edges=(1.0, 1.7),
    confounded=(0.05, 0.2),
    weight=(0.5, 2.0),
    weight_scale="uniform",
    omega=(0.4, 0.7),
    noise=(0.7, 1.2),
    noise_of="all",
)
"""The paper's generator, but for its fixed number of edges, here binomial, and its labels, there before the projection."""
BROAD = Prior()
HIDDEN = Prior(confounding="hidden")


class Knowledge(NamedTuple):
    """What is known about the seen variables before any data.

    required[i, j]: i -> j exists. forbidden[i, j]: i -> j does not; both ways, the pair is not adjacent at all. No vertex causes one of a lower tier.
    """

    required: Bool[AnyArray, "V V"]
    forbidden: Bool[AnyArray, "V V"]
    tier: Float[AnyArray, "V"]


class Sem(NamedTuple):
    """A linear model over T vertices; coefficients are those of its mixed graph."""

    weights: Float[AnyArray, "T T"]
    omega: Float[AnyArray, "T T"]
    marks: Int8[AnyArray, "V V"]


def structure(size: int, prior: Prior, knowledge: Knowledge | None = None) -> Sem:
    """Samples a graph and its coefficients: the part that `gaussian` and `rows` share."""
    hidden = num_hidden(size, prior)
    total = size + hidden
    first, second = np.triu_indices(total, 1)
    before, adjacent, confounded = _graph(total, prior, hidden, knowledge)
    uniform = lambda name, count: numpyro.sample(name, dist.Uniform(-1, 1).expand([count]).to_event(1))
    weight = _signed(uniform("weight_unit", len(first)), prior.weight, prior.weight_scale)
    omega = _signed(uniform("omega_unit", len(first)), prior.omega, "uniform")
    count = total if prior.noise_of == "each" else 1
    unit = numpyro.sample("noise_unit", dist.Uniform().expand([count]).to_event(1))
    noise = prior.noise[0] + unit * (prior.noise[1] - prior.noise[0])

    pairwise = lambda values: jnp.zeros((total, total)).at[first, second].set(values)
    symmetric = lambda values: pairwise(values) + pairwise(values).T
    bidirected = symmetric(adjacent * confounded) > 0
    directed = (symmetric(adjacent * (1 - confounded)) > 0) & before
    directed, bidirected = _known(directed, bidirected, knowledge)
    covariances = symmetric(omega) * bidirected
    diagonal = jnp.diag(noise + jnp.abs(covariances).sum(axis=1))
    marks = projection.maximal_ancestral(*_seen(directed, bidirected, size))
    return Sem(symmetric(weight) * directed, covariances + diagonal, numpyro.deterministic("marks", marks))


def num_hidden(size: int, prior: Prior) -> int:
    """T - V."""
    return max(1, size // prior.seen_per_hidden) if prior.confounding == "hidden" else 0


def gaussian(
    size: int,
    num_rows: float | Int[AnyArray, ""],
    prior: Prior,
    knowledge: Knowledge | None = None,
    cov_tril: Float[AnyArray, "V V"] | None = None,
) -> Sem:
    """Model of the sample covariance of `num_rows` > V + 1 Gaussian rows (traced: no recompilation); `cov_tril` observes it."""
    sem = structure(size, prior, knowledge)
    scale = jnp.linalg.cholesky(covariance(sem)[:size, :size])
    degrees = jnp.asarray(num_rows, jnp.float32) - 1
    # a factor as it is made: checks of it would compute beside the traced program, on devices that are only compiled for
    wishart = dist.WishartCholesky(degrees, scale_tril=scale / jnp.sqrt(degrees), validate_args=False)
    numpyro.sample("cov_tril", wishart, obs=cov_tril)
    return sem


def covariance(sem: Sem) -> Float[Array, "T T"]:
    """Sigma = (I - W)^-T Omega (I - W)^-1."""
    total = jnp.linalg.inv(jnp.eye(len(sem.weights)) - sem.weights)
    return total.T @ sem.omega @ total


class Simulated(NamedTuple):
    covariance: Float[Array, "V V"]
    """Of the sample, unbiased."""
    marks: Int8[Array, "V V"]


def simulate(
    key: Key,
    size: int,
    num_rows: float | Int[AnyArray, ""],
    prior: Prior,
    knowledge: Knowledge | None = None,
    given: dict[str, Any] | None = None,
) -> Simulated:
    """One data set and the graph to be learnt from it; `vmap` over keys for many.

    Args:
        given: sites with their values, for example `graph_sites(...)`: the rest is drawn anew.
    """
    model = handlers.seed(handlers.condition(gaussian, data=given or {}), key)
    sites = handlers.trace(model).get_trace(size, num_rows, prior, knowledge)
    factor = sites["cov_tril"]["value"]
    return Simulated(factor @ factor.T, sites["marks"]["value"])


def graph_sites(directed: graphs.Edges, bidirected: graphs.Edges) -> dict[str, Array]:
    """The sites that fix an acyclic graph with at most one edge on a pair, for priors without hidden vertices."""
    directed, bidirected = jnp.asarray(directed) != 0, jnp.asarray(bidirected) != 0
    first, second = np.triu_indices(directed.shape[0], 1)
    depth = graphs.ancestors(directed).sum(axis=0) / (
        directed.shape[0] + 1
    )  # a cause has fewer ancestors than its effect
    return {
        "priority": depth,
        "adjacent": (directed | directed.T | bidirected)[first, second].astype(jnp.int32),
        "confounded": bidirected[first, second].astype(jnp.int32),
    }


class Coefficients(NamedTuple):
    """Draws from the posterior of a fixed graph."""

    weights: Float[Array, "S V V"]
    omega: Float[Array, "S V V"]


def coefficients(
    key: Key,
    sample_covariance: Float[AnyArray, "V V"],
    num_rows: int,
    directed: graphs.Edges,
    bidirected: graphs.Edges,
    prior: Prior,
    *,
    num_warmup: int = 300,
    num_samples: int = 300,
) -> Coefficients:
    """NUTS over the coefficients of a fixed graph, given the unbiased sample covariance of `num_rows` > V + 1 rows.

    The prior's sign is no assumption, its range is: no coefficient lies within (-low, low). Small graphs: all pairs are sampled.
    """
    size = directed.shape[0]
    sites = {**graph_sites(directed, bidirected), "family": jnp.int32(0)}
    model = handlers.condition(gaussian, data=sites)
    sampler = infer.MCMC(infer.NUTS(model), num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    sampler.run(key, size, num_rows, prior, None, jnp.linalg.cholesky(jnp.asarray(sample_covariance)))
    units = {name: value for name, value in sampler.get_samples().items() if name.endswith("_unit")}

    def read(unit):
        fixed = handlers.condition(lambda: structure(size, prior), data={**sites, **unit})
        return handlers.seed(fixed, jax.random.key(0))()  # what is left does not change the coefficients

    draws = jax.lax.map(read, units)
    return Coefficients(draws.weights, draws.omega)


def _graph(total, prior, hidden, knowledge):
    """(before [T, T], adjacent [P], confounded [P]); the last two as 0.0 or 1.0."""
    position = numpyro.sample("position", dist.Uniform().expand([total]).to_event(1))
    per_vertex = numpyro.sample("edges_per_vertex", dist.Uniform(*prior.edges))
    family = numpyro.sample("family", dist.Categorical(logits=jnp.zeros(len(prior.families))))
    each = jnp.stack([families.pair_probabilities(name, position, per_vertex) for name in prior.families])
    adjacent = numpyro.sample("adjacent", dist.Bernoulli(each[family]).to_event(1))
    share = 0.0
    if not hidden:
        share = numpyro.sample("share", dist.Uniform(*prior.confounded))
    confounded = numpyro.sample("confounded", dist.Bernoulli(jnp.full(len(adjacent), share)).to_event(1))
    priority = numpyro.sample("priority", dist.Uniform().expand([total]).to_event(1))
    priority = jnp.where(
        jnp.arange(total) < total - hidden, priority, priority / 2
    )  # early ones have children to confound
    if knowledge is not None:
        seen, free = slice(None, len(knowledge.tier)), jnp.isnan(knowledge.tier)
        tier = jnp.where(free, 0.0, knowledge.tier)
        anywhere = priority[seen] * (2 * tier.max() + 1)  # in no tier: before, between or after all of them
        placed = jnp.where(free, anywhere, priority[seen] + 2 * tier)
        priority = priority.at[seen].set(_after_causes(placed, knowledge.required))
    return priority[:, None] < priority[None], adjacent.astype(jnp.float32), confounded.astype(jnp.float32)


def _after_causes(priority, required):
    """`priority` with every vertex moved behind those that must cause it."""
    above = graphs.ancestors(required)
    latest = jnp.where(above, priority[:, None], -jnp.inf).max(axis=0)
    return latest + 1e-3 * above.sum(axis=0)  # of two with the same latest cause, the effect has more ancestors


def _known(directed, bidirected, knowledge):
    if knowledge is None:
        return directed, bidirected
    seen = slice(None, len(knowledge.tier))
    later = knowledge.tier[:, None] > knowledge.tier[None]
    known = directed[seen, seen] & ~knowledge.forbidden & ~later | knowledge.required
    shared = bidirected[seen, seen] & ~(knowledge.forbidden & knowledge.forbidden.T)
    shared &= ~(knowledge.required | knowledge.required.T)
    return directed.at[seen, seen].set(known), bidirected.at[seen, seen].set(shared)


def _signed(unit, bounds, scale):
    """Sign and quantile, in (-1, 1), as a number whose absolute value lies within the bounds."""
    low, high = bounds
    quantile = jnp.abs(unit)
    size = low + quantile * (high - low) if scale == "uniform" else low * (high / low) ** quantile
    return jnp.where(unit < 0, -size, size)


def _seen(directed, bidirected, size):
    """The mixed graph over the seen: hidden vertices stand last and have no i <-> j."""
    shown, shared = graphs.latent_projection(directed, size)
    return shown, shared | bidirected[:size, :size]
