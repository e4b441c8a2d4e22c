"""Steps through real networks, encoder and UNet: on eight virtual devices and under `pmap` they give what one device gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import without_talk

from dmsec_jax import parallel, pipeline
from dmsec_jax.core import pgd
from dmsec_jax.core.pgd import Budget
from dmsec_jax.diffusion.schedule import ScheduleConfig
from dmsec_jax.methods import advdm, cgi_dm
from dmsec_jax.models import presets, unet, vae

pytestmark = pytest.mark.slow  # compiles every step three times

SCHEDULE = ScheduleConfig()
KEY = jax.random.key(0)
PRESET = presets.TINY
FUNCTIONS = pipeline.functions(PRESET.unet, PRESET.vae, PRESET.text)
COUNT = 8
INDEX = np.arange(COUNT)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (COUNT, PRESET.vae.sample_size, PRESET.vae.sample_size, 3)).astype(np.float32)
SIDE = PRESET.unet.sample_size
LATENT = RNG.normal(size=(COUNT, SIDE, SIDE, PRESET.unet.in_channels)).astype(np.float32)
MASK = np.asarray(cgi_dm.checkerboard(SIDE, SIDE, 2))


@pytest.fixture(scope="module")
def params():
    """Two networks and the autoencoder, all of random weights."""
    keys = jax.random.split(KEY, 4)
    return {
        "unet": tuple(unet.init(key, PRESET.unet) for key in keys[:2]),
        "context": tuple(jax.random.normal(keys[2], (2, 1, 7, PRESET.unet.cross_attention_dim))),
        "vae": vae.init(keys[3], PRESET.vae),
    }


def protect(key, params, image, index):
    # steps along the gradient, not along its sign, which rounding can turn
    attack = pgd.Config(norm="l2", budget=Budget(4.0, "pm1"), step_size=Budget(1.0, "pm1"), num_steps=3)
    cfg = advdm.Config(attack=attack, num_draws=2)

    def eps_fn(params, z_t, t):
        context = jnp.broadcast_to(params["context"][0], (len(z_t), *params["context"][0].shape[1:]))
        return FUNCTIONS.predict_fn(params["unet"][0], z_t, t, context)

    functions = {"encode_fn": lambda params, image: FUNCTIONS.encode_fn(params["vae"], image), "eps_fn": eps_fn}
    everywhere = jnp.ones((*image.shape[:3], 1))
    options = {"objective_fn": advdm.denoising, "schedule": SCHEDULE, **functions}
    state, info = advdm.run(key, image, everywhere, 0.0, index, params, cfg, **options)
    return state.attack.delta, info.value.T


def recover(key, params, known, index):
    cfg = cgi_dm.Config(eps=2.0, alpha=0.5, num_steps=3, num_draws=2)
    options = {"pair_fn": pipeline.in_turn(FUNCTIONS.predict_fn), "schedule": SCHEDULE}
    state, info = cgi_dm.run(key, known, known * MASK, MASK, index, params, cfg, **options)
    return state.delta, info.contrast.T


def assert_same(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


@pytest.mark.parametrize(("run", "rows"), [(protect, IMAGE), (recover, LATENT)], ids=["AdvDM", "CGI-DM"])
def test_steps_through_networks_on_a_mesh_and_under_pmap_are_those_on_one_device(run, rows, params):
    alone = jax.device_get(jax.jit(run)(KEY, params, rows, INDEX))
    delta, _ = alone
    assert np.abs(delta).max() > 0.01

    assert_same(without_talk(run, KEY, params, rows, INDEX), alone)
    twin = parallel.pmapped(run, (None, None, 0, 0))(KEY, params, rows, INDEX)
    assert_same(parallel.joined(twin), alone)
