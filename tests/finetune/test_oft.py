import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core.trees import flatten
from dmsec_jax.finetune.adapters import count
from dmsec_jax.finetune.oft import constrained, oft, rotation

KEY = jax.random.key(0)
DENSE = (r"attn\d/.*/kernel",)
R = jax.random.normal(jax.random.key(1), (3, 5, 5))


@pytest.mark.parametrize("cayley", ["reference", "peft"])
def test_blocks_are_orthogonal(cayley):
    q = rotation(R, cayley)
    np.testing.assert_allclose(q @ q.mT, np.broadcast_to(np.eye(5), q.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(q), 1, atol=1e-4)


def test_conventions_are_transposes_of_each_other_and_cayleys_map():
    skew = np.asarray(R - R.mT, np.float64) / 2
    by_hand = (np.eye(5) - skew) @ np.linalg.inv(np.eye(5) + skew)
    np.testing.assert_allclose(rotation(R), by_hand, atol=1e-5)
    np.testing.assert_allclose(rotation(R, "peft"), by_hand.transpose(0, 2, 1), atol=1e-5)
    np.testing.assert_allclose(rotation(-R, "peft"), rotation(R), atol=1e-6)


def test_starts_at_the_base_model_exactly(toy):
    adapter = oft(1, DENSE)
    merged = adapter.merge(toy.params, adapter.init(KEY, toy.params))
    jax.tree.map(np.testing.assert_array_equal, merged, toy.params)


def test_kernels_are_rotated_block_by_block(toy):
    adapter = oft(2, (r"attn1/to_out_0/kernel",))
    trainable = {"block": {"attn1": {"to_out_0": {"generator": jax.random.normal(KEY, (2, 2, 2))}}}}
    merged, base = flatten(adapter.merge(toy.params, trainable)), flatten(toy.params)
    path = "block/attn1/to_out_0/kernel"
    q = np.asarray(rotation(trainable["block"]["attn1"]["to_out_0"]["generator"]))
    whole = np.zeros((4, 4), np.float32)
    whole[:2, :2], whole[2:, 2:] = q
    np.testing.assert_allclose(merged[path], whole @ np.asarray(base[path]), atol=1e-5)
    gram = lambda w: np.asarray(w).T @ np.asarray(w)
    np.testing.assert_allclose(gram(merged[path]), gram(base[path]), atol=1e-4)  # angles between neurons stay
    assert all(merged[other] is base[other] for other in base if other != path)


def test_every_scale_is_a_rotation_and_zero_is_the_base(toy):
    adapter = oft(2, (r"attn1/to_out_0/kernel",))
    trainable = {"block": {"attn1": {"to_out_0": {"generator": jax.random.normal(KEY, (2, 2, 2))}}}}
    at = lambda scale: adapter.merge(toy.params, trainable, scale)["block"]["attn1"]["to_out_0"]["kernel"]
    np.testing.assert_allclose(at(0.0), toy.params["block"]["attn1"]["to_out_0"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(at(1.0), at(None), atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(at(3.0)), jnp.linalg.norm(at(None)), rtol=1e-5)


def test_constrained_generators_stay_in_their_ball(toy):
    found = constrained(R, 0.5)
    np.testing.assert_allclose(jnp.sqrt(jnp.square(found).sum(axis=(1, 2))), 0.5, rtol=1e-5)
    np.testing.assert_array_equal(constrained(0.01 * R, 0.5), 0.01 * R)
    gradient = jax.grad(lambda g: constrained(g, 0.5).sum())(jnp.zeros((1, 2, 2)))
    assert np.isfinite(gradient).all(), "training starts at zero"
    adapter = oft(2, (r"attn1/to_out_0/kernel",), radius=1e-3)
    trainable = {"block": {"attn1": {"to_out_0": {"generator": 100 * jnp.ones((2, 2, 2)).at[:, 0].set(0.0)}}}}
    merged = adapter.merge(toy.params, trainable)["block"]["attn1"]["to_out_0"]["kernel"]
    assert 0 < np.abs(merged - toy.params["block"]["attn1"]["to_out_0"]["kernel"]).max() < 1e-2


def test_number_of_trainable_scalars(toy):
    assert count(oft(2, (r"attn1/to_out_0/kernel",)), toy.params) == 2 * 2 * 2


@pytest.mark.parametrize(("call", "message"), [
    (lambda params: oft(0), "blocks must be at least 1"),
    (lambda params: oft(radius=0.0), "radius must be positive, or null"),
    (lambda params: oft(targets="all"), "targets must be one of attention"),
    (lambda params: oft(targets=()), "targets must be at least one pattern"),
    (lambda params: oft(3, DENSE).init(KEY, params), "blocks must be a divisor of 4, the width of block/attn1/to_out_0/kernel"),
    (lambda params: oft(1, (r"conv1/kernel",)).init(KEY, params), "targets must be Dense kernels"),
    (lambda params: oft(1, DENSE).merge(params, {"x": {"generator": jnp.zeros((1, 2, 2))}}), "made of layers of the base tree"),
])  # fmt: skip
def test_bad_choices_are_named(toy, call, message):
    with pytest.raises(ValueError, match=message):
        call(toy.params)
