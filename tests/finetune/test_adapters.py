import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.finetune.adapters import count, full

KEY = jax.random.key(0)


def equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_full_starts_at_the_base_and_shares_no_buffer(toy):
    trainable = full().init(KEY, toy.params)
    assert equal(full().merge(toy.params, trainable), toy.params)
    for leaf in jax.tree.leaves(trainable):
        leaf.delete()  # as donation does
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(toy.params))


def test_full_with_patterns_trains_only_what_they_find(toy):
    adapter = full(["norm", "bias$"])
    trainable = jax.tree.map(lambda leaf: leaf + 1, adapter.init(KEY, toy.params))
    expected = {"block/norm/scale", "block/conv1/bias", "block/attn1/to_out_0/bias"}
    assert trees.flatten(trainable).keys() == expected
    merged, base = trees.flatten(adapter.merge(toy.params, trainable)), trees.flatten(toy.params)
    for path in base:
        np.testing.assert_array_equal(merged[path], base[path] + (path in expected))


def test_half_precision_weights_are_trained_in_float32(toy):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), toy.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(full().init(KEY, half))} == {"float32"}


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_scale_extrapolates_the_change(toy, scale):
    trainable = jax.tree.map(lambda leaf: leaf + 2.0, full().init(KEY, toy.params))
    merged = jax.jit(full().merge)(toy.params, trainable, scale)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, old + 2 * scale, atol=1e-6), merged, toy.params)


def test_pattern_that_finds_nothing_raises(toy):
    with pytest.raises(ValueError, match=r"found in some parameter path.*'nrom'"):
        full(["nrom"]).init(KEY, toy.params)


@pytest.mark.parametrize("change", [{"other": jnp.ones(3)}, {"block": {"norm": {"scale": jnp.ones(7)}}}])
def test_merge_with_another_base_raises(toy, change):
    with pytest.raises(ValueError, match="trainable must be a part of the base tree"):
        full().merge(toy.params, change)


def test_count_needs_only_shapes(toy):
    shapes = jax.eval_shape(lambda tree: tree, toy.params)
    assert count(full(), shapes) == 3 * 3 * 3 * 4 + 4 + 5 * 4 + 4 * 3 + 3 + 3
    assert count(full(["scale"]), shapes) == 3
