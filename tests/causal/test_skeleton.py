"""The posterior over skeletons in small: what training lowers, what it is calibrated on, what it does not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from dmsec_jax.causal import features, sem, skeleton
from dmsec_jax.metrics import graph as metrics
from dmsec_jax.models import skeleton_net

NET = skeleton_net.EdgeMLP(width=32)
SIZE = 6
CFG = skeleton.Config(num_steps=60, pairs=240, sizes=(SIZE,), rows=(200, 2000), learning_rate=1e-2)


@functools.cache
def trained():
    return skeleton.train(jax.random.key(0), sem.SPOT, NET, CFG)


@functools.cache
def held_out():
    phi, adjacent = jax.jit(lambda key: skeleton.batch(key, SIZE, 256, sem.SPOT, CFG.rows))(jax.random.key(99))
    logits = handlers.seed(handlers.substitute(skeleton.likelihood, {"net": trained().params}), 0)(phi, net=NET)
    return np.asarray(jax.nn.sigmoid(logits)), np.asarray(adjacent)


@pytest.mark.slow  # a minute or two of compiling and training
def test_training_lowers_the_forward_divergence_below_the_base_rate():
    loss = trained().loss
    assert np.isfinite(loss).all()
    probability, adjacent = held_out()
    rate = adjacent.mean()
    base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert loss[:5].mean() > base
    assert metrics.log_loss(probability, adjacent) < 0.7 * base
    assert metrics.auroc(probability, adjacent) > 0.9


@pytest.mark.slow  # a minute or two of compiling and training
def test_probabilities_sum_to_the_edges_they_stand_for():
    """Calibrated in the large on the prior, by the standard error of the difference over data sets."""
    probability, adjacent = held_out()
    gap = (probability - adjacent).sum(axis=1)
    assert abs(gap.mean()) < 0.1 * adjacent.sum(axis=1).mean() + 3 * gap.std(ddof=1) / np.sqrt(len(gap))


@pytest.mark.parametrize("net", [NET, skeleton_net.EdgeTransformer(width=8, depth=1)], ids=["mlp", "transformer"])
def test_names_do_not_matter(net):
    params = skeleton_net.init(jax.random.key(1), net, features.COUNT)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(2), leaf.shape), params)
    corr = np.corrcoef(np.random.default_rng(0).normal(size=(50, SIZE)).cumsum(axis=1), rowvar=False).astype(np.float32)
    order = np.random.default_rng(1).permutation(SIZE)
    probabilities = jax.jit(lambda corr: skeleton.edge_probabilities(params, net, corr, 50))
    found = np.asarray(probabilities(corr))
    np.testing.assert_allclose(probabilities(corr[np.ix_(order, order)]), found[np.ix_(order, order)], atol=2e-3)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    assert (np.diagonal(found) == 0).all()
    assert np.ptp(metrics.pairs(found)) > 0.01


def test_the_model_samples_skeletons_when_none_is_given():
    phi = jnp.zeros((2, 4, 4, features.COUNT))
    params = skeleton_net.init(jax.random.key(0), NET, features.COUNT)
    model = handlers.trace(handlers.seed(handlers.substitute(skeleton.likelihood, {"net": params}), 3))
    sampled = model.get_trace(phi, net=NET)["adjacent"]["value"]
    assert sampled.shape == (2, 6)
    assert set(np.unique(sampled)) <= {0, 1}


@pytest.mark.slow
def test_going_on_around_one_graph_sharpens_it():
    """Vicinal fine-tuning: data sets of one graph; its own skeleton becomes likelier than before."""
    directed, bidirected = np.zeros((2, SIZE, SIZE), bool)
    for i, j in ((0, 1), (1, 2), (3, 2), (4, 5)):
        directed[i, j] = True
    bidirected[2, 4] = bidirected[4, 2] = True
    given = sem.graph_sites(directed, bidirected)
    cfg = skeleton.Config(num_steps=60, pairs=240, sizes=(SIZE,), rows=(500, 501), learning_rate=3e-3)
    before = trained().params
    after = skeleton.train(jax.random.key(5), sem.SPOT, NET, cfg, given=given, start=before).params
    phi, adjacent = jax.jit(lambda key: skeleton.batch(key, SIZE, 16, sem.SPOT, cfg.rows, given=given))(
        jax.random.key(6)
    )

    def loss(params):
        logits = handlers.seed(handlers.substitute(skeleton.likelihood, {"net": params}), 0)(phi, net=NET)
        return metrics.log_loss(np.asarray(jax.nn.sigmoid(logits)), np.asarray(adjacent))

    assert loss(after) < loss(before)
