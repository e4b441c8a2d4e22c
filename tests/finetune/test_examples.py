import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.finetune.examples import Examples, examples, take

KEY = jax.random.key(0)


def test_examples_scale_both_moments_and_repeat_one_prompt():
    mean, logvar = jnp.ones((3, 2, 2, 1)), jnp.full((3, 2, 2, 1), -1.0)
    built = examples(mean, jnp.array([[5, 6]]), logvar, scaling_factor=0.5)
    np.testing.assert_allclose(built.mean, 0.5)
    np.testing.assert_allclose(jnp.exp(0.5 * built.logvar), 0.5 * np.exp(-0.5), rtol=1e-6)
    np.testing.assert_array_equal(built.prompt, [[5, 6]] * 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": jnp.ones((0, 2, 2, 1))}, "mean must be .* N > 0"),
        ({"mean": jnp.ones((2, 2, 1))}, r"mean must be \[N, h, w, c\]"),
        ({"logvar": jnp.ones((1, 2, 2, 1))}, "logvar must be .* like mean"),
        ({"prompt": jnp.ones((2, 4), jnp.int32)}, r"prompt must be \[1 or 3"),
    ],
)
def test_examples_refuse_shapes_that_disagree(fields, message):
    good = {"mean": jnp.ones((3, 2, 2, 1)), "prompt": jnp.ones((1, 4), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        examples(**(good | fields))


def numbered(count):
    return Examples(jnp.arange(count, dtype=jnp.float32), jnp.arange(count))


def sequence(count, size, batches, key=KEY):
    """What `take` gives in `batches` batches of `size`, one after the other."""
    chosen = jax.jit(take, static_argnums=2)
    return np.concatenate([chosen(key, i * size, size, numbered(count)).prompt for i in range(batches)])


@pytest.mark.parametrize(("count", "size"), [(5, 1), (5, 2), (3, 7), (1, 3)])
def test_every_epoch_holds_every_picture_once(count, size):
    epochs = sequence(count, size, 4 * count)[: 4 * count].reshape(-1, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (len(epochs), 1)))
    assert count == 1 or len(np.unique(epochs, axis=0)) > 1  # reshuffled


def test_order_depends_on_the_key_and_not_on_the_cut_into_batches():
    one = sequence(5, 1, 12)
    np.testing.assert_array_equal(one, sequence(5, 3, 4))
    np.testing.assert_array_equal(one, sequence(5, 12, 1))
    assert not np.array_equal(one, sequence(5, 12, 1, jax.random.key(1)))
