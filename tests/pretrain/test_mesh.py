"""What ships can be trained on a mesh of virtual devices, with the result of one device, and go on on another."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import parallel
from dmsec_jax.causal import skeleton as posterior
from dmsec_jax.diffusion.schedule import ScheduleConfig, alpha_bars
from dmsec_jax.models import vae
from dmsec_jax.models.skeleton_net import EdgeMLP
from dmsec_jax.pretrain import autoencoder, denoiser, skeleton, stages

KEY = jax.random.key(0)
WIDE = 256  # a kernel of spread.SMALL entries
CFG = denoiser.Config(num_steps=4, batch_size=8, warmup_steps=1, learning_rate=1e-2)


def close(found, expected, **bounds):
    found, expected = jax.device_get((found, expected))
    jax.tree.map(partial(np.testing.assert_allclose, **{"rtol": 1e-4, "atol": 1e-5} | bounds), found, expected)


def train(folder, num_steps):
    """A denoiser of one wide kernel, in chunks of two steps, each saved."""
    mean = jax.random.normal(jax.random.key(1), (4, 2, 2, 2, WIDE))
    data = denoiser.Data(mean, jnp.ones_like(mean), jnp.arange(1, 5).reshape(4, 1, 1), jnp.zeros(1, jnp.int32))
    networks = {
        "predict_fn": lambda params, z_t, t, context: jnp.tanh(z_t @ params["kernel"] + context[:, :, :, None]),
        "text_fn": lambda params, ids: params["table"][ids][..., None],
    }
    start = {
        "unet": {"kernel": 0.05 * jax.random.normal(KEY, (WIDE, WIDE))},
        "text_encoder": {"table": jnp.zeros(5)},
    }
    advance = stages._compiled(partial(denoiser.run, KEY, **networks))
    fixed = parallel.placed({"data": data, "alpha_bar": alpha_bars(ScheduleConfig()), "cfg": CFG})
    recipe, begin = stages.Recipe(chunk_steps=2, save_every=2), lambda: denoiser.init(start, CFG)
    return stages._loop("denoiser", begin, partial(advance, fixed), recipe, num_steps, folder, lambda *_: None, {})


def test_the_state_is_cut_saved_whole_and_restored_elsewhere(tmp_path):
    expected = train(tmp_path / "alone", 4)
    with jax.set_mesh(parallel.make_mesh("data=2,fsdp=4")):
        half = train(tmp_path / "mesh", 2)
    kernels = [leaf for leaf in jax.tree.leaves(half) if leaf.shape == (WIDE, WIDE)]
    assert len(kernels) == 4  # weights, both moments, the average
    assert all(leaf.addressable_shards[0].data.shape == (WIDE, WIDE // 4) for leaf in kernels)
    with jax.set_mesh(parallel.make_mesh("data=4,fsdp=2")):
        rest = train(tmp_path / "mesh", 4)
    assert int(rest.step) == 4
    close(rest, expected)


@pytest.mark.slow  # compiles the gradient of an autoencoder twice
def test_the_autoencoder_learns_from_rows_that_devices_share():
    model = vae.VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)
    cfg = autoencoder.Config(num_steps=2, batch_size=8, warmup_steps=1)
    pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    step = jax.jit(partial(autoencoder.step, cfg=cfg, model=model))
    state = autoencoder.init(KEY, model, cfg)
    _, expected = step(KEY, state, pictures)
    with jax.set_mesh(parallel.make_mesh()):
        _, found = step(KEY, state, pictures)
    close(found, expected)


RECIPE = skeleton.Recipe(
    net=EdgeMLP(width=8, depth=1),
    train=posterior.Config(num_steps=4, pairs=80, sizes=(5,), rows=(50, 100)),  # eight data sets an update
    chunk_steps=2,
)


def test_a_posterior_over_skeletons_goes_on_on_a_mesh(tmp_path):
    train = lambda folder, recipe=RECIPE: skeleton.train(recipe, tmp_path / folder, lambda *_: None)
    expected = train("alone")

    def stop(done, losses):
        raise KeyboardInterrupt

    with jax.set_mesh(parallel.make_mesh()), pytest.raises(KeyboardInterrupt):
        skeleton.train(RECIPE, tmp_path / "mesh", stop)
    with jax.set_mesh(parallel.make_mesh("data=4,fsdp=2")):
        found = train("mesh")
    close(found, expected)
    close(train("mesh"), expected)  # nothing left to do


def test_what_a_training_starts_from_stays():
    cfg = dataclasses.replace(RECIPE.train, num_steps=1)
    first = posterior.train(KEY, RECIPE.prior, RECIPE.net, cfg)
    posterior.train(KEY, RECIPE.prior, RECIPE.net, cfg, start=first.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
