"""Feature networks without PyTorch: shapes, blur pooling written out, what the shipped weights see, conversion errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import efficientnet
from dmsec_jax.core import trees
from dmsec_jax.metrics import perception
from dmsec_jax.models import features

CFG = features.FeaturesConfig(widths=(4, 6, 8, 6, 5))
apply = jax.jit(features.apply, static_argnums=0)
distance = jax.jit(features.distance, static_argnums=0)


@pytest.fixture(scope="module")
def shipped():
    return features.load()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, 64, 64, 3)), (0, 3, 3, 0))
    return np.clip(smooth / smooth.std() / 2, -1, 1).astype(np.float32)


def test_blur_pool_is_a_binomial_filter_on_a_reflected_picture():
    x = np.random.default_rng(0).normal(size=(2, 7, 10, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    taps = np.array([1, 2, 1]) / 4
    expected = sum(
        taps[i] * taps[j] * padded[:, i : i + 9, j : j + 12] for i in range(3) for j in range(3)
    )[:, ::2, ::2]  # fmt: skip
    np.testing.assert_allclose(features.blur_pool(jnp.asarray(x)), expected, atol=1e-6)


def test_output_sizes_of_a_64_pixel_picture():
    shapes = jax.eval_shape(
        lambda params, x: features.apply(features.FeaturesConfig(), params, x),
        jax.eval_shape(lambda: features.init(jax.random.key(0), features.FeaturesConfig())),
        jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32),
    )
    assert [s.shape for s in shapes] == [
        (2, 30, 30, 64),
        (2, 15, 15, 192),
        (2, 8, 8, 384),
        (2, 8, 8, 256),
        (2, 8, 8, 256),
    ]


def test_random_parameters_work_and_each_picture_is_seen_alone(weights, pictures):
    params = weights(features.init, CFG)
    whole = apply(CFG, params, pictures)
    changed = pictures.copy()
    changed[1:] = pictures[:0:-1]
    for a, b in zip(whole, apply(CFG, params, changed), strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)
        assert np.abs(a[1] - b[1]).max() > 1e-3


def test_shipped_weights_fit_the_architecture(shipped):
    cfg, params = shipped
    target = jax.eval_shape(lambda: features.init(jax.random.key(0), cfg))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, target)
    assert trees.count(params) == 2_469_696 + 1_152
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert all((leaf >= 0).all() for path, leaf in trees.flatten(params).items() if path.startswith("lin"))


def test_distance_orders_changes_as_people_do(shipped, pictures):
    cfg, params = shipped
    a = pictures[:1]
    noise = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    shifted = np.roll(a, 1, axis=2)
    others = [a, a + 0.02 * noise, a + 0.2 * noise, pictures[1:2]]
    values = distance(cfg, params, np.concatenate([a] * 5), np.concatenate([*others, shifted]))
    assert values[0] < 1e-9
    assert 0 < values[1] < values[2] < values[3]
    assert values[4] < values[3] / 4, "a shift of one pixel is a small change"
    swapped = distance(cfg, params, np.concatenate([*others, shifted]), np.concatenate([a] * 5))
    np.testing.assert_allclose(values, swapped, rtol=1e-4)


def test_distance_has_a_finite_gradient_even_between_equal_pictures(weights, pictures):
    params = weights(features.init, CFG)
    gradient = jax.jit(jax.grad(lambda x, y: features.distance(CFG, params, x, y).sum()))
    flat = np.zeros((1, 32, 32, 3), np.float32)
    assert np.isfinite(gradient(flat, flat)).all()
    some = gradient(flat, pictures[:1, :32, :32])
    assert np.isfinite(some).all()
    assert np.abs(some).max() > 0


def test_efficientnet_has_the_published_size():
    cfg = efficientnet.EfficientNetConfig()
    shapes = trees.flatten(jax.eval_shape(lambda: efficientnet.init(jax.random.key(0), cfg)))
    kernels = sum(np.prod(leaf.shape) for path, leaf in shapes.items() if path.endswith("kernel"))
    biases = sum(np.prod(leaf.shape) for path, leaf in shapes.items() if path.endswith("bias"))
    assert (
        kernels + 2 * biases + 1000 * 1281 == 4_652_008
    )  # two affine batch-norm parameters per channel, and the classifier


SMALL = efficientnet.EfficientNetConfig(
    stages=(efficientnet.Stage(1, 3, 1, 1, 4), efficientnet.Stage(2, 3, 2, 2, 6)), stem=5, head=7
)


def test_efficientnet_outputs_one_map_per_stage(weights):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    outputs = jax.jit(efficientnet.apply, static_argnums=0)(SMALL, weights(efficientnet.init, SMALL), x)
    assert [o.shape for o in outputs] == [(2, 8, 8, 4), (2, 4, 4, 6), (2, 4, 4, 7)]
    assert 0 <= outputs[-1].min() < outputs[-1].max() <= 6


@pytest.mark.parametrize(("call", "message"), [
    (lambda: features.apply(CFG, {}, np.zeros((1, 16, 64, 3), np.float32)), "at least 32 pixels"),
    (lambda: features.distance(CFG, {}, np.zeros((1, 64, 64, 3), np.float32), np.zeros((2, 64, 64, 3), np.float32)), "b must be of the shape"),
    (lambda: efficientnet.convert({"_bn0.weight": np.zeros(5), "more": np.zeros(1)}, SMALL), r"missing: _bn0\.bias[\s\S]*unused: more"),
])  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_distances_of_encoded_pictures_are_those_of_their_pairs(shipped, pictures):
    cfg, params = shipped
    vectors = jax.jit(features.perceptual, static_argnums=0)(cfg, params, pictures)
    found = perception.squared_distances(vectors)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    expected = distance(cfg, params, *(pictures[list(side)] for side in zip(*pairs, strict=True)))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-6)
