"""SPOT: which variables cause which, when some causes are hidden? A posterior over skeletons guides a differentiable search.

Ma, Ding, Fu, Zhang, Liu, Kong, Zhang, "Scalable Differentiable Causal Discovery in the Presence of Latent Confounders with Skeleton Posterior",
KDD 2024, arXiv 2406.10537.

Algorithm
    1. P(i and j adjacent | data) from a network trained on simulated graphs (`causal.skeleton`).
    2. Minimise, over directed W and bidirected C, the augmented Lagrangian of ABIC (Bhattacharya et al., AISTATS 2021)

           F = LS(W, C) + lambda sum tanh(log(n) / 2 |theta|) + rho / 2 h^2 + alpha h,   h = acyclic(W) + class(W, C),

       where P says which coefficients may grow (`guide`) or what they cost; one `step` is one value of (rho, alpha).
    3. Drop coefficients below a threshold, and the weakest edge that keeps the graph out of its class, until none does (`finish`).
    4. Fit the graph that is left by maximum likelihood; of several starts keep the one of the lowest BIC (`search`).
    `discovery.SPOT` goes on from the starts' orders of variables with a local search (`causal.refine`), which is not the paper's.

Symbols
    W1 -> `directed`    W2 -> `bidirected`    P -> `Guide.probability`    lambda -> `penalty`    t -> `State.i`    Z -> `mag.Pseudo`

Deviations: public code, and what is here by default (the public behaviour by name, and the test that pins it)
    - Masks gradients inside L-BFGS-B, whose line search they break: updates of Adam are masked (test_adam_forgets_masked_gradients).
    - Growth probability (0.1 + P)^(1 / (t + 2)) (`guide="spot"`, `exclude=1e-3`; test_growth_by_hand): P is calibrated here, so it is the odds of
      an edge that weigh its penalty (`guide="log-odds"`), which prototypes found best; `"prob"` masks by P without fading.
    - Loops over variables, with V inverses: the covariance form of the score (test_covariance_form_is_the_loop_form).
    - Raises one threshold until the graph is acyclic, else returns the empty graph, and does not look at <->: the weakest offending edge is
      dropped, one at a time (test_finish_drops_the_weakest_offender).
    - Resets rho's ladder from the last accepted iterate: one iterate goes on, rho grows where h has not shrunk to a quarter.
    - Ancestral graphs only: any `class_fn`; no bidirected edges at all (`guide_dag`) is NOTEARS with a smooth L0 and a guide.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Int8

from dmsec_jax.causal import guide, mag, penalties, projection
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import config
from dmsec_jax.core.types import AnyArray, Key

AcyclicFn = Callable[[Float[Array, "V V"]], Float[Array, ""]]
"""(directed) -> h, zero exactly where acyclic: of `causal.penalties`."""
ClassFn = Callable[[Float[Array, "V V"], Float[Array, "V V"]], Float[Array, ""]]
"""(directed, bidirected) -> h, zero exactly on the class."""
OffendingFn = Callable[[Bool[Array, "V V"], Bool[Array, "V V"]], Bool[Array, "V V"]]
"""(directed, bidirected) -> which i <-> j keep an acyclic graph out of the class."""


@config
class Config:
    """Values for standardised or raw data alike.

    exclude: no edge where P is at most this. threshold: coefficients below are dropped at the end.
    penalty: lambda. start: coefficients are uniform in [-start, start] at first, less in large graphs.
    rho, rho_growth, rho_max: of the augmented Lagrangian; rho grows where h > shrink x the last h. Beyond 1e5 float32 and
        Adam follow h alone and undo the score (measured: skeleton F1 0.90 falls to 0.58 at 1e8); `finish` makes h zero.
    """

    num_steps: int = 16
    inner_steps: int = 250
    refresh: int = 25  # inner steps between new pseudo-variables
    guide: Literal["off", "spot", "prob", "log-odds"] = "log-odds"
    exclude: float = 0.1
    penalty: float = 0.05
    learning_rate: float = 0.01
    threshold: float = 0.05
    start: float = 0.5
    rho: float = 1.0
    rho_growth: float = 10.0
    rho_max: float = 1e5
    shrink: float = 0.25


class Guide(NamedTuple):
    """What is believed before the search (the `params` of `run`)."""

    probability: Float[AnyArray, "V V"]
    """P, symmetric."""
    directed: Bool[AnyArray, "V V"]
    bidirected: Bool[AnyArray, "V V"]
    """Which edges may be; the second symmetric."""


class State(NamedTuple):
    directed: Float[Array, "V V"]
    bidirected: Float[Array, "V V"]
    alpha: Float[Array, ""]
    rho: Float[Array, ""]
    h: Float[Array, ""]
    i: Int[Array, ""]
    """Steps done: t."""


class Info(NamedTuple):
    """After each step; `run` stacks them."""

    score: Float[Array, "..."]
    """LS."""
    h: Float[Array, "..."]
    rho: Float[Array, "..."]
    edges: Int[Array, "..."]
    """Coefficients above the threshold."""
    finite: Bool[Array, "..."]


class Graph(NamedTuple):
    """What is found: a member of the class with its maximum-likelihood fit, and the marks of its maximal ancestral graph."""

    directed: Float[Array, "V V"]
    omega: Float[Array, "V V"]
    bic: Float[Array, ""]
    marks: Int8[Array, "V V"]


def guide_mag(probability: Float[AnyArray, "V V"]) -> Guide:
    """Every edge may be."""
    off = ~jnp.eye(len(probability), dtype=bool)
    return Guide(jnp.asarray(probability), off, off)


def guide_dag(probability: Float[AnyArray, "V V"]) -> Guide:
    """No hidden causes: a directed acyclic graph is learnt."""
    full = guide_mag(probability)
    return full._replace(bidirected=jnp.zeros_like(full.bidirected))


def guide_draws(key: Key, guide: Guide, count: int) -> Guide:
    """Skeletons drawn from P in place of P, [count, V, V]: one for each start of `search`."""
    size = len(guide.probability)
    first, second = np.triu_indices(size, 1)
    drawn = jax.random.bernoulli(key, jnp.asarray(guide.probability)[first, second], (count, len(first)))
    upper = jnp.zeros((count, size, size)).at[:, first, second].set(drawn.astype(jnp.float32))
    repeated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), guide)
    return repeated._replace(probability=upper + upper.mT)


def init(key: Key, covariance: Float[AnyArray, "V V"], params: Guide, cfg: Config) -> State:
    """A random start inside the region where every acyclicity penalty is finite (rows of W o W sum to at most 1/2)."""
    key_directed, key_bidirected = jax.random.split(key)
    shape = covariance.shape
    masks = _masks(params, cfg)
    directed = jax.random.uniform(key_directed, shape, minval=-cfg.start, maxval=cfg.start) * masks[0]
    largest = jnp.square(directed).sum(axis=1).max()
    directed = directed * jnp.minimum(1.0, jnp.sqrt(0.5 / jnp.maximum(largest, 1e-12)))
    lower = jax.random.uniform(key_bidirected, shape, minval=-cfg.start / 10, maxval=cfg.start / 10) * masks[1]
    rho = jnp.asarray(cfg.rho, jnp.float32)
    return State(directed, lower + lower.T, jnp.float32(0), rho, jnp.float32(jnp.inf), jnp.int32(0))


def step(
    key: Key,
    state: State,
    covariance: Float[AnyArray, "V V"],
    num_rows: float | Int[AnyArray, ""],
    params: Guide,
    cfg: Config,
    *,
    acyclic_fn: AcyclicFn = penalties.squarings,
    class_fn: ClassFn = penalties.ancestral,
) -> tuple[State, Info]:
    """Minimises F at the state's (rho, alpha) by `cfg.inner_steps` guided steps of Adam, then updates (rho, alpha).

    Args:
        key: this step's.
        covariance: of the data, or their correlation matrix; num_rows: how many rows it is from.
    """
    masks = _masks(params, cfg)
    costs, mode = _costs(params, cfg)
    mask = guide.guided((params.probability, params.probability), mode)
    optimiser = optax.chain(optax.adam(cfg.learning_rate), mask)

    def constraint(directed, bidirected):
        return acyclic_fn(directed) + class_fn(directed, bidirected)

    def objective(theta, at):
        directed, bidirected = _edges(theta, masks)
        h = constraint(directed, bidirected)
        count = sum((costs * mag.l0(part, num_rows) * where).sum() for part, where in zip(theta, masks, strict=True))
        score = mag.least_squares(directed, bidirected, covariance, at)
        return score + cfg.penalty * count + state.rho / 2 * h**2 + state.alpha * h

    def inner(carry, k, at):
        theta, last, moments, pace = carry
        value, gradient = jax.value_and_grad(objective)(theta, at)
        good = jnp.isfinite(value)  # a step out of the region of `acyclic_fn` is taken back, and later ones are shorter
        theta = jax.tree.map(lambda new, old: jnp.where(good, new, old), theta, last)
        gradient = jax.tree.map(lambda g: jnp.where(good & jnp.isfinite(g), g, 0.0), gradient)
        updates, moments = optimiser.update(gradient, moments, theta, key=jax.random.fold_in(key, k), iteration=state.i)
        pace = jnp.where(good, pace, pace / 2)
        moved = jax.tree.map(lambda x, u: x + pace * u, theta, updates)
        return (moved, theta, moments, pace), None

    def block(carry, b):
        at = mag.pseudo(*_edges(carry[1], masks), covariance)
        return jax.lax.scan(partial(inner, at=at), carry, b * cfg.refresh + jnp.arange(cfg.refresh))

    whole = cfg.inner_steps >= cfg.refresh > 0 and cfg.inner_steps % cfg.refresh == 0
    require(whole, "inner_steps", f"a multiple of refresh={cfg.refresh}", cfg.inner_steps, "round it")
    theta = (state.directed, jnp.tril(state.bidirected, -1))
    carry = (theta, theta, optimiser.init(theta), jnp.float32(1))
    (theta, last, _, _), _ = jax.lax.scan(block, carry, jnp.arange(cfg.inner_steps // cfg.refresh))
    good = jnp.isfinite(constraint(*_edges(theta, masks)))
    directed, bidirected = _edges(jax.tree.map(lambda new, old: jnp.where(good, new, old), theta, last), masks)

    h = constraint(directed, bidirected)
    rho = jnp.where(h > cfg.shrink * state.h, jnp.minimum(state.rho * cfg.rho_growth, cfg.rho_max), state.rho)
    score = mag.least_squares(directed, bidirected, covariance, mag.pseudo(directed, bidirected, covariance))
    edges = (jnp.abs(directed) > cfg.threshold).sum() + (jnp.abs(jnp.tril(bidirected)) > cfg.threshold).sum()
    finite = jnp.isfinite(score) & jnp.isfinite(h)
    state = State(directed, bidirected, state.alpha + state.rho * h, rho, h, state.i + 1)
    return state, Info(score, h, rho, edges, finite)


def run(
    key: Key,
    covariance: Float[AnyArray, "V V"],
    num_rows: float | Int[AnyArray, ""],
    params: Guide,
    cfg: Config,
    *,
    acyclic_fn: AcyclicFn = penalties.squarings,
    class_fn: ClassFn = penalties.ancestral,
) -> tuple[State, Info]:
    """All steps as one `scan`; the start is drawn with `key`, step i uses fold_in(key, i).

    Example:
        jax.jit(run, static_argnames=("acyclic_fn", "class_fn"))
    """

    def body(state, i):
        options = {"acyclic_fn": acyclic_fn, "class_fn": class_fn}
        return step(jax.random.fold_in(key, i), state, covariance, num_rows, params, cfg, **options)

    return jax.lax.scan(body, init(key, covariance, params, cfg), jnp.arange(cfg.num_steps))


def finish(
    state: State,
    covariance: Float[AnyArray, "V V"],
    num_rows: float | Int[AnyArray, ""],
    cfg: Config,
    *,
    offending_fn: OffendingFn = penalties.not_ancestral,
    required: Bool[AnyArray, "V V"] | None = None,
) -> Graph:
    """Drops what is below the threshold, then the weakest offending edge until none is left, and fits what remains.

    Args:
        required: i -> j that stay however weak; together acyclic.
    """
    scale = jnp.sqrt(jnp.diagonal(covariance))
    directed = jnp.abs(state.directed)
    directed, bidirected = (
        jnp.where(part > cfg.threshold, part, 0.0) for part in (directed, jnp.abs(state.bidirected))
    )
    # strengths in units of the variables, so that they can be compared
    directed, bidirected = directed * scale[:, None] / scale, bidirected / scale / scale[:, None]
    if required is not None:
        directed = jnp.where(required, jnp.inf, directed)
    directed = _without(directed, lambda left: penalties.on_cycles(left, bidirected))
    bidirected = _without(bidirected, lambda left: offending_fn(directed, left))
    with jax.default_matmul_precision("highest"):  # n times a trace: elsewhere rounding outweighs the price of an edge
        fit = mag.refit(directed, bidirected, covariance, num_rows)
    return Graph(*fit, projection.maximal_ancestral(directed, bidirected))


def search(
    key: Key,
    covariance: Float[AnyArray, "V V"],
    num_rows: float | Int[AnyArray, ""],
    params: Guide,
    cfg: Config,
    *,
    acyclic_fn: AcyclicFn = penalties.squarings,
    class_fn: ClassFn = penalties.ancestral,
    offending_fn: OffendingFn = penalties.not_ancestral,
) -> tuple[Graph, Graph]:
    """One start per leading index of `params` [R, V, V], all at once: the graph of the lowest BIC, and all graphs.

    Repeat a guide for restarts (`jnp.broadcast_to`), or pass `guide_draws`.
    """

    def one(own, guidance):
        state, _ = run(own, covariance, num_rows, guidance, cfg, acyclic_fn=acyclic_fn, class_fn=class_fn)
        return finish(state, covariance, num_rows, cfg, offending_fn=offending_fn)

    found = jax.vmap(one)(jax.random.split(key, len(params.probability)), params)
    best = jnp.nanargmin(found.bic)
    return jax.tree.map(lambda leaf: leaf[best], found), found


def _masks(params, cfg):
    """Where coefficients may be: of directed edges, and of the lower triangle of bidirected ones."""
    off = ~jnp.eye(len(params.probability), dtype=bool)
    likely = jnp.asarray(params.probability) > cfg.exclude
    if cfg.guide == "off":
        likely = jnp.ones_like(likely)
    return (params.directed & likely & off).astype(jnp.float32), jnp.tril(params.bidirected & likely & off).astype(
        jnp.float32
    )


def _costs(params, cfg):
    """(relative costs of edges [V, V], mode of the mask)."""
    if cfg.guide == "log-odds":
        return guide.log_odds_weights(params.probability), "off"
    return jnp.ones_like(params.probability), cfg.guide


def _edges(theta, masks):
    directed, lower = theta[0] * masks[0], theta[1] * masks[1]
    return directed, lower + lower.T


def _without(strength, offending):
    """`strength` [V, V] with the weakest offending edge set to zero, again and again."""

    def weakest(state):
        left, where = state
        lightest = jnp.where(where, left, jnp.inf).min()
        left = jnp.where(where & (left == lightest), 0.0, left)
        return left, offending(left)

    return jax.lax.while_loop(lambda state: state[1].any(), weakest, (strength, offending(strength)))[0]
