"""Draws of (t, noise): distribution, strata, and independence from how examples are batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.diffusion import draws

KEY = jax.random.key(0)
WINDOW = (100, 300)


def every(draw, num_draws, key=KEY, shape=(2,), examples=1, window=WINDOW):
    """t [examples, num_draws] and noise [examples, num_draws, *shape]."""
    keys = draws.example_keys(key, jnp.arange(examples))
    one = lambda own, k: draw(own, k, num_draws, shape, window)
    t, noise = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(keys, jnp.arange(num_draws))
    return np.asarray(t), np.asarray(noise)


def test_example_noise_depends_on_the_example_alone():
    whole = draws.example_noise(KEY, jnp.arange(6), (3, 2))
    part = draws.example_noise(KEY, jnp.array([4, 2]), (3, 2))
    np.testing.assert_array_equal(part, whole[jnp.array([4, 2])])
    assert np.unique(np.asarray(whole)).size == whole.size


@pytest.mark.parametrize("draw", [draws.uniform_draw, draws.stratified_draw, draws.antithetic_draw])
def test_t_is_uniform_over_the_window(draw):
    t, noise = every(draw, 4, examples=10_000)
    assert t.min() == 100
    assert t.max() == 299
    width = 200
    spread = np.sqrt((width**2 - 1) / 12)
    assert abs(t.mean() - 199.5) < 5 * spread / np.sqrt(20_000)
    counts = np.bincount((t.ravel() - 100) // 20, minlength=10)
    np.testing.assert_allclose(counts / counts.sum(), 0.1, atol=0.01)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_stratified_draws_cover_every_part_once():
    t, _ = every(draws.stratified_draw, 10, examples=50)
    np.testing.assert_array_equal((t - 100) // 20, np.broadcast_to(np.arange(10), (50, 10)))


def test_stratified_mean_is_steadier_than_uniform():
    curve = lambda t: (t / 300.0) ** 2
    uniform = curve(every(draws.uniform_draw, 8, examples=400)[0]).mean(axis=1)
    stratified = curve(every(draws.stratified_draw, 8, examples=400)[0]).mean(axis=1)
    assert stratified.std() < uniform.std() / 4
    assert abs(stratified.mean() - uniform.mean()) < 5 * uniform.std() / 20


def test_antithetic_pairs_share_t_and_mirror_noise():
    t, noise = every(draws.antithetic_draw, 6, examples=5)
    np.testing.assert_array_equal(t[:, ::2], t[:, 1::2])
    np.testing.assert_array_equal(noise[:, ::2], -noise[:, 1::2])
    assert (np.diff(t[:, ::2], axis=1) > 0).all()
    with pytest.raises(ValueError, match="even"):
        draws.antithetic_draw(KEY, jnp.int32(0), 3, (2,), WINDOW)


def test_listed_draw_takes_from_the_list_alone():
    t, _ = every(draws.listed_draw(jnp.array([5, 50, 500])), 3, examples=300)
    values, counts = np.unique(t, return_counts=True)
    assert values.tolist() == [5, 50, 500]
    assert counts.min() > 200


def test_many_draws_are_those_of_each_example_one_after_another():
    drawn = lambda own, k: draws.stratified_draw(own, k, 2, (3,), WINDOW)
    t, noise = draws.many(KEY, jnp.arange(4), 2, drawn)
    t_later, noise_later = draws.many(KEY, jnp.array([3]), 2, drawn)
    assert (t.shape, noise.shape) == ((8,), (8, 3))
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(t_later, t[6:])
    np.testing.assert_array_equal(noise_later, noise[6:])


def test_batch_strata_cover_the_window_whatever_the_micro_batches():
    t = draws.batch_stratified_t(KEY, jnp.arange(8), 8, window=WINDOW)
    assert sorted(((np.asarray(t) - 100) // 25).tolist()) == list(range(8))
    assert ((np.asarray(t) - 100) // 25).tolist() != list(range(8))
    halves = [draws.batch_stratified_t(KEY, jnp.arange(i, i + 4), 8, window=WINDOW) for i in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), t)


def test_the_last_timestep_is_never_passed():
    always_one = lambda key: jnp.float32(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "uniform", always_one)
        t, _ = draws.stratified_draw(KEY, jnp.int32(3), 4, (1,), WINDOW)
    assert int(t) == 299
