"""The guide by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stats import assert_mean

from dmsec_jax.causal import guide


def test_growth_by_hand():
    p = jnp.array([0.0, 0.4, 1.0])
    assert guide.growth(p, 0, "off").tolist() == [1, 1, 1]
    assert guide.growth(p, 3, "prob").tolist() == p.tolist()
    np.testing.assert_allclose(guide.growth(p, 0, "spot"), [0.1**0.5, 0.5**0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(guide.growth(p, 8, "spot"), [0.1**0.1, 0.5**0.1, 1.0], rtol=1e-6)


def test_towards_zero_is_free_and_away_is_drawn():
    params = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0])
    updates = jnp.array([-0.1, 0.1, 0.1, -0.1, 0.1])
    never, always = (guide.guided(jnp.full(5, p), "prob") for p in (0.0, 1.0))
    apply = lambda rule: rule.update(updates, rule.init(params), params, key=jax.random.key(0), iteration=0)[0]
    np.testing.assert_allclose(apply(never), [-0.1, 0, 0.1, 0, 0])
    np.testing.assert_allclose(apply(always), updates)


def test_growth_happens_as_often_as_the_guide_says():
    probability = jnp.array([0.2, 0.7])
    rule = guide.guided(probability, "spot")
    params = jnp.ones(2)

    def once(key):
        return rule.update(params, optax.EmptyState(), params, key=key, iteration=1)[0]

    moved = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(1), 4000))
    assert_mean(moved, [0.3 ** (1 / 3), 0.8 ** (1 / 3)], resolution=0.05)


def test_a_group_moves_as_one():
    params = {"layer": jnp.ones((4, 4, 3)), "out": jnp.ones((4, 4))}
    probability = {"layer": jnp.full((4, 4), 0.5), "out": jnp.zeros((4, 4))}
    rule = guide.guided(probability, "prob")
    updates = jax.tree.map(jnp.ones_like, params)
    moved = rule.update(updates, rule.init(params), params, key=jax.random.key(0), iteration=0)[0]
    layer = np.asarray(moved["layer"])
    assert (layer == layer[:, :, :1]).all()
    assert 0 < layer.sum() < layer.size
    assert not np.asarray(moved["out"]).any()
    mixed = {"layer": updates["layer"].at[:, :, 0].set(-5.0), "out": -updates["out"]}  # the whole group points back
    moved = rule.update(mixed, rule.init(params), params, key=jax.random.key(0), iteration=0)[0]
    jax.tree.map(np.testing.assert_array_equal, moved, mixed)


def test_adam_forgets_masked_gradients():
    """A tenth of the gradients moves Adam a third of the way (sqrt(0.1)); a tenth of the updates, a tenth."""
    chance, count, size = 0.1, 400, 200
    mask = guide.guided(jnp.full(size, chance), "prob")

    def travelled(masked_first):
        adam = optax.adam(1e-3)
        chain = optax.chain(mask, adam) if masked_first else optax.chain(adam, mask)

        def body(carry, key):
            params, state = carry
            updates, state = chain.update(-jnp.ones(size), state, params, key=key, iteration=0)
            return (params + updates, state), None

        start = jnp.full(size, 1.0)
        keys = jax.random.split(jax.random.key(0), count)
        (end, _), _ = jax.lax.scan(body, (start, chain.init(start)), keys)
        return (end - start) / (1e-3 * count)

    by_gradient, by_update = np.asarray(travelled(True)), np.asarray(travelled(False))
    assert_mean(by_update, chance, resolution=0.02)
    assert by_gradient.mean() > 2.5 * chance


def test_log_odds_by_hand():
    found = guide.log_odds_weights(jnp.array([[0.5, 0.1], [0.0, 1.0]]))
    np.testing.assert_allclose(found, [[0.25, np.log(0.9001 / 0.1001)], [8.0, 0.25]], rtol=1e-5)
