import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.models import layers

SAME, ASYMMETRIC = ((1, 1), (1, 1)), ((0, 1), (0, 1))


def lax_conv(x, kernel, stride, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


CASES = [  # kernel size, stride, padding, height and width
    (3, 1, SAME, (6, 5)),
    (3, 2, SAME, (6, 8)),
    (3, 2, ASYMMETRIC, (6, 8)),
    (3, 2, SAME, (5, 7)),
    (4, 2, ((1, 2), (3, 0)), (7, 6)),
    (3, 3, SAME, (7, 8)),
    (5, 1, ((2, 2), (2, 2)), (6, 5)),
    (3, 1, ((0, 0), (0, 0)), (5, 6)),
    (3, 1, ((2, 0), (1, 2)), (5, 6)),
    (3, 1, ((3, 1), (1, 1)), (5, 6)),
]
WAYS = {"whole batch": (2**17, 64), "chunked": (300, 64), "shifted": (2**17, 1)}


@pytest.mark.parametrize(("cache_floats", "many"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("size", "stride", "padding", "side"), CASES)
def test_convolution_and_both_gradients_equal_lax(monkeypatch, size, stride, padding, side, cache_floats, many):
    monkeypatch.setattr(layers, "CACHE_FLOATS", cache_floats)
    monkeypatch.setattr(layers, "MANY", many)
    monkeypatch.setattr(layers, "LARGE_MAP", 0)
    x, kernel = draw(4, *side, 3), draw(size, size, 3, 2, seed=1)
    ours, our_vjp = jax.vjp(lambda x, k: layers.conv(x, k, stride, padding), x, kernel)
    theirs, their_vjp = jax.vjp(lambda x, k: lax_conv(x, k, stride, padding), x, kernel)
    np.testing.assert_array_equal(ours, theirs)
    cotangent = draw(*ours.shape, seed=2)
    for a, b in zip(our_vjp(cotangent), their_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_many_channels_shifts_the_cotangent(monkeypatch):
    called = []
    monkeypatch.setattr(
        layers, "_shifted", lambda x, g, *, size, padding: called.append(size) or jnp.zeros((*size, 64, 64))
    )
    grad = jax.grad(lambda k, stride: layers.conv(draw(1, 4, 4, 64), k, stride, SAME).sum())
    grad(draw(3, 3, 64, 64), 2)
    assert called == []
    grad(draw(3, 3, 64, 64), 1)
    assert set(called) == {(3, 3)}


@pytest.mark.parametrize(("inside", "outside", "count"), [(3, 3, 8), (3, 16, 4), (16, 16, 2), (16, 32, 1)])
def test_few_channels_of_large_maps_are_taken_in_column_groups(inside, outside, count):
    x, kernel = draw(1, 40, 32, inside), draw(3, 3, inside, outside, seed=1)
    assert layers.column_groups(x.shape, kernel.shape, 1, SAME) == count
    assert layers.column_groups((1, 40, 31, inside), kernel.shape, 1, SAME) == 1
    ours, our_vjp = jax.vjp(lambda x, k: layers.conv(x, k, 1, SAME), x, kernel)
    theirs, their_vjp = jax.vjp(lambda x, k: lax_conv(x, k, 1, SAME), x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(our_vjp(draw(*ours.shape, seed=2)), their_vjp(draw(*ours.shape, seed=2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_gradient_of_the_gradient_equals_lax():
    x, kernel, v = draw(2, 5, 5, 2), draw(3, 3, 2, 2, seed=1), draw(3, 3, 2, 2, seed=2)

    def hessian_product(conv):
        loss = lambda x, k: jnp.sum(jnp.sin(conv(x, k)))
        along = lambda x: jnp.vdot(jax.grad(loss, 1)(x, kernel), v)
        return jax.jit(jax.grad(along))(x)

    theirs = hessian_product(lambda x, k: lax_conv(x, k, 1, SAME))
    np.testing.assert_allclose(hessian_product(layers.conv), theirs, rtol=1e-4, atol=1e-5)


def test_gradients_in_bfloat16_keep_their_dtype_and_accumulate_in_float32():
    x, kernel = draw(2, 16, 16, 4), draw(3, 3, 4, 4, seed=1)
    low = jax.grad(lambda k: jnp.sum(layers.conv(x.astype(jnp.bfloat16), k).astype(jnp.float32) ** 2))
    grad = low(kernel.astype(jnp.bfloat16))
    assert grad.dtype == jnp.bfloat16
    exact = jax.grad(lambda k: jnp.sum(lax_conv(x, k, 1, SAME) ** 2))(kernel)
    assert np.max(np.abs(np.float32(grad) - exact)) < 0.02 * np.max(np.abs(exact))


@pytest.mark.parametrize("size", [1, 3])
def test_conv_module_is_convolution_plus_bias(size):
    x, kernel, bias = draw(2, 4, 4, 3), draw(size, size, 3, 5, seed=1), draw(5, seed=2)
    ours = layers.Conv(5, size=size).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(ours, lax_conv(x, kernel, 1, "SAME") + bias, rtol=1e-5, atol=1e-5)


def test_group_norm_normalises_each_group_of_each_example():
    x, scale, bias = draw(2, 3, 5, 8) * 3 + 1, draw(8, seed=1), draw(8, seed=2)
    ours = layers.GroupNorm(4, 1e-3).apply({"params": {"scale": scale, "bias": bias}}, x)
    grouped = np.asarray(x, np.float64).reshape(2, 15, 4, 2)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-3)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activate", [False, True])
def test_gradients_of_group_norm_are_those_of_its_formula(activate):
    x, scale, bias, cotangent = draw(2, 6, 8) * 3 + 1, draw(8, seed=1), draw(8, seed=2), draw(2, 6, 8, seed=3)

    def formula(x, scale, bias):
        grouped = x.reshape(2, 6, 4, 2)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        y = ((grouped - mean) / jnp.sqrt(variance + 1e-3)).reshape(x.shape) * scale + bias
        return y * jax.nn.sigmoid(y) if activate else y

    ours = jax.vjp(lambda *args: layers.group_norm(*args, 4, 1e-3, activate), x, scale, bias)[1](cotangent)
    for a, b in zip(ours, jax.vjp(formula, x, scale, bias)[1](cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_of_doubling_sums_the_four_copies():
    x, g = draw(2, 3, 4, 5), draw(2, 6, 8, 5, seed=1)
    out, vjp = jax.vjp(layers.doubled, x)
    np.testing.assert_array_equal(out, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(vjp(g)[0], np.asarray(g).reshape(2, 3, 2, 4, 2, 5).sum((2, 4)), rtol=1e-5, atol=1e-5)


def test_group_norm_statistics_are_float32_and_survive_an_offset():
    x = draw(1, 8, 8, 4)
    params = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    apply = lambda x, dtype: layers.GroupNorm(2, dtype=dtype).apply(params, x)
    plain = apply(x, jnp.float32)
    assert np.max(np.abs(apply(x + 300.0, jnp.float32) - plain)) < 1e-3  # E[x^2] - E[x]^2 would lose two more digits
    low = apply(x.astype(jnp.bfloat16), jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert np.max(np.abs(np.float32(low) - plain)) < 2e-2  # one rounding before, one after


def test_group_norm_names_channels_that_do_not_split():
    with pytest.raises(ValueError, match=r"multiple of the number of norm groups 4, got 6"):
        layers.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 2, 2, 6)))


def test_upsample_repeats_pixels_before_its_convolution():
    x = draw(1, 2, 3, 2)
    identity = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
    out = layers.Upsample(2).apply({"params": {"conv": {"kernel": identity, "bias": jnp.zeros(2)}}}, x)
    np.testing.assert_array_equal(out, np.asarray(x).repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(("flip", "shift", "width"), [(True, 0, 6), (False, 1, 6), (True, 0, 7)])
def test_timestep_features_follow_the_formula(flip, shift, width):
    t, half = np.array([0, 1, 999]), 3
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / (half - shift))
    halves = (np.cos(angles), np.sin(angles)) if flip else (np.sin(angles), np.cos(angles))
    expected = np.concatenate([*halves, np.zeros((3, width - 6))], axis=1)
    ours = layers.timestep_features(jnp.asarray(t), width, flip_sin_to_cos=flip, freq_shift=shift)
    np.testing.assert_allclose(ours, expected, atol=1e-4)  # float32 angles of up to 999 radians
