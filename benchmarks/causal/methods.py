"""What is asked of one data set: the posterior alone, the gradient search with every guide, local searches, and other programs.

    posterior       edges of probability above 1/2; a skeleton
    unguided        the gradient search (ABIC), without the posterior
    spot-annealed   guided as in the paper
    spot-masked     guided by the probability itself
    spot            guided by log-odds
    spot+local      local searches from the likely skeleton, oriented by likelihood, and by what `spot` found
    local           the same without gradients: a random order in place of `spot`'s
    fci, fci-andrey, gfci, boss    other programs (`peers`)

What does not change with the units of the variables is asked once, of scale "either".
"""

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from benchmarks.causal import peers
from dmsec_jax import discovery
from dmsec_jax.causal import features, graphs
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core.types import Key
from dmsec_jax.methods import spot

Scale = Literal["raw", "standardised", "either"]
Marks = Int8[np.ndarray, "V V"]
GUIDES = {"unguided": "off", "spot-annealed": "spot", "spot-masked": "prob", "spot": "log-odds"}
PAPERS_EXCLUDE = 1e-3
"""Least probability of an edge that the paper's guide lets the search try."""
UNITS = (*GUIDES, "spot+local")
"""Methods whose answer depends on units."""
ALL = ("posterior", *UNITS, "local", *peers.PEERS)


class Question(NamedTuple):
    data: Float[np.ndarray, "N V"]
    seed: int
    posterior: Posterior
    family: discovery.Family
    restarts: int


def scales(method: str) -> tuple[Scale, ...]:
    return ("raw", "standardised") if method in UNITS else ("either",)


def ask(method: str, scale: Scale, question: Question, earlier: Mapping[str, Marks]) -> Marks:
    """Marks; of the posterior, tails on both ends of likely edges.

    Args:
        earlier: what `spot` answered at this scale; only `spot+local` looks.
    """
    if method in peers.PEERS:
        return peers.PEERS[method](question.data).pag
    probability = probabilities(question.posterior, question.data)
    if method == "posterior":
        return (3 * (probability > 0.5)).astype(np.int8)
    if method in GUIDES:
        return _by_gradients(question, probability, GUIDES[method], scale)
    if method == "spot+local":
        return _local(question, probability, graphs.to_edges(earlier["spot"])[0][None])
    places = np.random.default_rng(question.seed).random(len(probability))
    return _local(question, probability, (places[:, None] < places)[None])


def probabilities(posterior: Posterior, data: Float[np.ndarray, "N V"]) -> Float[np.ndarray, "V V"]:
    """Edge probabilities, the same for raw and standardised data."""
    corr = features.correlation(data)
    return np.array(discovery.linked(posterior.params, posterior.net, corr, float(len(data))))


def _covariance(data, scale: Scale):
    covariance = np.cov(data, rowvar=False) if scale == "raw" else np.corrcoef(data, rowvar=False)
    return discovery.regularised(covariance.astype(np.float32), len(data))


def _guide(question: Question, probability) -> spot.Guide:
    return spot.guide_dag(probability) if question.family == "dag" else spot.guide_mag(probability)


def _by_gradients(question: Question, probability, guide: str, scale: Scale) -> Marks:
    """The graph of the lowest BIC of all starts."""
    key, rows = jax.random.key(question.seed), jnp.float32(len(question.data))
    guidance = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (question.restarts, *leaf.shape)), _guide(question, probability)
    )
    covariance = _covariance(question.data, scale)
    cfg = spot.Config(guide=guide, exclude=PAPERS_EXCLUDE) if guide == "spot" else spot.Config(guide=guide)
    return np.asarray(_searched(key, covariance, rows, guidance, cfg, question.family).marks)


def _local(question: Question, probability, orders) -> Marks:
    model = discovery.SPOT(family=question.family)
    covariance, guide = _covariance(question.data, "standardised"), _guide(question, probability)
    required = np.zeros(probability.shape, bool)
    silent = lambda stage, done, total: None
    found = discovery.refined(orders, guide, covariance, len(question.data), required, model, silent)
    return np.asarray(found.graph.marks)


@functools.partial(jax.jit, static_argnames="family")
def _searched(key: Key, covariance, num_rows, guidance, cfg, family) -> spot.Graph:
    acyclic_fn, class_fn, offending_fn = discovery.CLASSES[family]
    options = {"acyclic_fn": acyclic_fn, "class_fn": class_fn, "offending_fn": offending_fn}
    return spot.search(key, covariance, num_rows, guidance, cfg, **options)[0]
