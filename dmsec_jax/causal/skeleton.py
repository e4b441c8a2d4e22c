"""The posterior over skeletons: P(i and j adjacent | data), learnt once from simulated graphs, then read off in one pass.

q(S | D) is a product of Bernoulli variables whose logits a network computes from features of the sample covariance. Training minimises

    E_p(D) KL(p(S | D) || q(S | D)) = const - E_p(S, D) log q(S | D),

the forward Kullback-Leibler divergence. In NumPyro: the network is the likelihood of skeletons that were simulated, nothing is latent, so the
guide is empty and `Trace_ELBO` is that expectation. Because pairs are not balanced (the public code draws as many of each kind, which adds
log(absent / adjacent) to every logit), the probabilities are calibrated on the prior they were trained on, and on no other.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jaxtyping import Array, Float, Int
from numpyro import infer

from dmsec_jax.causal import features, sem
from dmsec_jax.causal.sem import Knowledge, Prior
from dmsec_jax.core import spread
from dmsec_jax.core.config import config
from dmsec_jax.core.types import AnyArray, Key, Params
from dmsec_jax.models import skeleton_net
from dmsec_jax.models.skeleton_net import SkeletonConfig


@config
class Config:
    """`num_steps` updates, each on data sets of one size of `sizes`, taken in turn.

    pairs: of variables in one update, together; so that sizes weigh alike, there are more data sets of fewer variables.
    rows: of a data set, log-uniform, but at least two more than variables.
    """

    num_steps: int = 2000
    pairs: int = 7000
    sizes: tuple[int, ...] = (10, 20, 30, 50)
    rows: tuple[int, int] = (250, 10_000)
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4


State = infer.svi.SVIState
"""Parameters, moments and key of a training, between two updates."""
OnChunk = Callable[[int, State, np.ndarray], None]
"""(updates done, state, loss of each update since the last call); the next update takes the state's memory."""


class Trained(NamedTuple):
    params: Params
    loss: np.ndarray
    """Of each step: -log q per pair, in nats."""


def likelihood(
    phi: Float[AnyArray, "B V V F"], adjacent: Int[AnyArray, "B P"] | None = None, *, net: SkeletonConfig
) -> Float[Array, "B P"]:
    """The NumPyro model: skeletons given features; without `adjacent`, it samples them. Returns the logits."""
    params = numpyro.param("net", lambda key: skeleton_net.init(key, net, phi.shape[-1]))
    first, second = np.triu_indices(phi.shape[1], 1)
    logits = jax.vmap(lambda one: skeleton_net.apply(net, params, one)[first, second])(phi)
    with numpyro.plate("data_set", logits.shape[0], dim=-2), numpyro.plate("pair", logits.shape[1], dim=-1):
        numpyro.sample("adjacent", dist.Bernoulli(logits=logits), obs=adjacent)
    return logits


def batch(
    key: Key,
    size: int,
    count: int,
    prior: Prior,
    rows: tuple[int, int],
    knowledge: Knowledge | None = None,
    given: dict[str, Any] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B V V F"], Int[Array, "B P"]]:
    """Features and skeletons of `count` simulated data sets, with no rows ever drawn; `rows` as in `Config`.

    Under `pmap` with `axis_name` these are the device's share of them.
    """
    first, second = np.triu_indices(size, 1)

    def one(key):
        key_rows, key_data = jax.random.split(key)
        low, high = (math.log(bound) for bound in rows)
        num_rows = jnp.maximum(jnp.exp(jax.random.uniform(key_rows, minval=low, maxval=high)), size + 2)
        drawn = sem.simulate(key_data, size, num_rows, prior, knowledge, given)
        phi = features.pair_features(features.of_covariance(drawn.covariance), num_rows)
        return phi, (drawn.marks[first, second] != 0).astype(jnp.int32)

    keys = spread.own_rows(jax.random.split(key, count), axis_name)
    return spread.even(jax.vmap(one)(spread.even(keys)))


def updating(
    prior: Prior,
    net: SkeletonConfig,
    cfg: Config,
    *,
    knowledge: Knowledge | None = None,
    given: dict[str, Any] | None = None,
    axis_name: str | None = None,
) -> Callable[[State, Key, int], tuple[State, Float[Array, ""]]]:
    """The update (state, key, size) -> (state, -log q per pair), pure, with `size` static; what is not finite changes no parameters.

    Its data sets are shared by the devices of the mesh in force if these divide them, or by those of a `pmap` with `axis_name`, which must.
    """
    svi = _svi(net, cfg, axis_name)

    def update(state: State, key: Key, size: int) -> tuple[State, Float[Array, ""]]:
        count = data_sets(size, cfg)
        phi, adjacent = batch(key, size, count, prior, cfg.rows, knowledge, given, axis_name)
        new, loss = svi.update(state, phi, adjacent)
        loss = spread.summed(loss, axis_name)
        # decided after the sum over devices, so that all of them decide alike
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, svi.get_params(new)))]).all()
        state = jax.tree.map(lambda ours, old: jnp.where(finite, ours, old), new, state)
        return state, loss / (count * math.comb(size, 2))

    return update


def train(
    key: Key,
    prior: Prior,
    net: SkeletonConfig,
    cfg: Config,
    *,
    knowledge: Knowledge | None = None,
    given: dict[str, Any] | None = None,
    start: Params | None = None,
    resume: tuple[int, State] | None = None,
    on_chunk: OnChunk | None = None,
    chunk: int = 100,
) -> Trained:
    """Trains on data sets simulated inside the jitted step; one compilation for each size.

    Args:
        knowledge, given: as `sem.simulate`; `sem.graph_sites` of a graph found for one data set makes data like it (vicinal fine-tuning).
        start: parameters to go on from.
        resume: what `on_chunk` got last, to go on as if nothing had happened; losses are those from there on.
        on_chunk: called after every `chunk` updates, and at the end.
    """
    update = updating(prior, net, cfg, knowledge=knowledge, given=given)

    @partial(jax.jit, static_argnames="size", donate_argnames="state")
    def advance(state, key, size):
        state, loss = update(state, key, size)
        return spread.cut(state), spread.whole(loss)

    key_init, key_steps = jax.random.split(key)
    done, state = (0, init(key_init, net, cfg, start)) if resume is None else resume
    # a copy, since updates take its memory; placed as updates leave it, or the second one would compile again
    state = jax.jit(lambda state: spread.cut(jax.tree.map(jnp.copy, state)))(state)
    losses: list[jax.Array] = []
    for i in range(done, cfg.num_steps):
        size = cfg.sizes[i % len(cfg.sizes)]
        state, loss = advance(state, jax.random.fold_in(key_steps, i), size=size)
        losses.append(loss)
        if on_chunk is not None and ((i + 1) % chunk == 0 or i + 1 == cfg.num_steps):
            since = i % chunk + 1
            on_chunk(i + 1, state, np.asarray(jnp.stack(losses[-since:])))
    return Trained(_svi(net, cfg).get_params(state)["net"], np.asarray(losses))


def init(key: Key, net: SkeletonConfig, cfg: Config, start: Params | None = None) -> State:
    """The state before the first update, of new parameters or of `start`."""
    return _first(_svi(net, cfg), key, start)


def data_sets(size: int, cfg: Config) -> int:
    """How many data sets of that many variables are in one update."""
    return max(1, cfg.pairs // (size * (size - 1) // 2))


def _first(svi, key, start):
    examples = jnp.zeros((1, 3, 3, features.COUNT)), jnp.zeros((1, 3), jnp.int32)
    return svi.init(key, *examples, init_params=None if start is None else {"net": start})


def _svi(net, cfg, axis_name=None):
    schedule = optax.cosine_decay_schedule(cfg.learning_rate, cfg.num_steps)
    adamw = optax.adamw(schedule, weight_decay=cfg.weight_decay)
    update = lambda grads, *rest: adamw.update(spread.summed(grads, axis_name), *rest)
    optimiser = optax.GradientTransformation(adamw.init, update)
    svi = infer.SVI(likelihood, lambda *args, **kwargs: None, optimiser, infer.Trace_ELBO(), net=net)
    jax.eval_shape(lambda: _first(svi, jax.random.key(0), None))  # numpyro learns the names of parameters here
    return svi


def edge_probabilities(
    params: Params, net: SkeletonConfig, corr: Float[AnyArray, "V V"], num_rows: float | Int[AnyArray, ""]
) -> Float[Array, "V V"]:
    """P of every pair, symmetric with zero diagonal; `vmap` over data sets."""
    probability = jax.nn.sigmoid(skeleton_net.apply(net, params, features.pair_features(corr, num_rows)))
    return probability * (1 - jnp.eye(corr.shape[0]))
