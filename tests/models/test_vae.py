import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import presets, vae

CFG = presets.TINY.vae
encode, decode = jax.jit(vae.encode, static_argnums=0), jax.jit(vae.decode, static_argnums=0)


@pytest.fixture(scope="module")
def params(weights):
    return weights(vae.init, CFG)


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def posterior(params, image):
    return encode(CFG, params, image)


def relative(a, b):
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def test_shapes_and_dtypes(params, posterior):
    mean, logvar = posterior
    assert mean.shape == logvar.shape == (2, 4, 6, 4)
    picture = decode(CFG, params, mean)
    assert picture.shape == (2, 8, 12, 3)
    assert {a.dtype for a in (mean, logvar, picture)} == {np.dtype("float32")}


@pytest.mark.slow  # compiles for long
def test_bfloat16_stays_close_and_returns_float32(params, image, posterior):
    low = dataclasses.replace(CFG, dtype="bfloat16")
    mean, _ = encode(low, params, image)
    assert mean.dtype == jnp.float32
    assert 1e-4 < relative(mean, posterior[0]) < 0.05
    pictures = [decode(cfg, params, posterior[0]) for cfg in (low, CFG)]
    assert pictures[0].dtype == jnp.float32
    assert 1e-4 < relative(*pictures) < 0.05


def test_log_variance_is_clipped_so_that_samples_stay_finite(params, image):
    extreme = params["quant_conv"] | {"bias": np.float32([0, 0, 0, 0, 1e3, -1e3, 1e3, -1e3])}
    _, logvar = encode(CFG, params | {"quant_conv": extreme}, image)
    np.testing.assert_array_equal(logvar, np.broadcast_to(np.float32([20, -30, 20, -30]), logvar.shape))


def test_posterior_samples_have_its_moments():
    mean, logvar = jnp.full((4000, 1, 1, 2), 3.0), jnp.broadcast_to(jnp.log(jnp.array([0.25, 4.0])), (4000, 1, 1, 2))
    draws = np.asarray(vae.sample_posterior(jax.random.key(0), mean, logvar))[:, 0, 0]
    std = np.array([0.5, 2.0])
    assert np.all(np.abs(draws.mean(0) - 3) < 5 * std / 4000**0.5)
    assert np.all(np.abs(draws.std(0) / std - 1) < 5 / 8000**0.5)


@pytest.mark.slow  # compiles for long
def test_remat_changes_no_number_and_no_name(weights, params, image):
    recomputed = dataclasses.replace(CFG, remat="block")
    assert trees.flatten(weights(vae.init, recomputed)).keys() == trees.flatten(params).keys()
    loss = lambda image, cfg: jnp.sum(vae.encode(cfg, params, image)[0] ** 2)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    stored = grad(image, CFG)
    assert np.any(stored != 0)
    np.testing.assert_allclose(grad(image, recomputed), stored, rtol=1e-4, atol=1e-5)


def test_remat_covers_every_residual_block(params, image):
    blocks = {path.rsplit("/", 2)[0] for path in trees.flatten(params["encoder"]) if "resnets_" in path}
    for remat, expected in (("block", len(blocks)), ("none", 0)):
        cfg = dataclasses.replace(CFG, remat=remat)
        program = jax.make_jaxpr(vae.encode, static_argnums=0)(cfg, params, image)
        names = [eqn.primitive.name for eqn in program.eqns]
        assert sum(name in ("checkpoint", "remat2") for name in names) == expected
    with pytest.raises(ValueError, match="remat must be 'none' or 'block', got 'full'"):
        vae.encode(dataclasses.replace(CFG, remat="full"), params, image)


@pytest.mark.parametrize("shape", [(8, 8, 3), (1, 7, 8, 3), (1, 8, 9, 3), (1, 8, 8, 4)])
def test_pictures_that_do_not_fit_are_named(params, shape):
    with pytest.raises(ValueError, match=r"image must be \[B, H, W, 3\] with H and W multiples of 2, got shape"):
        vae.encode(CFG, params, jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 4, 4, 3)])
def test_latents_that_do_not_fit_are_named(params, shape):
    with pytest.raises(ValueError, match=r"latent must be \[B, h, w, 4\], got shape"):
        vae.decode(CFG, params, jnp.zeros(shape))
