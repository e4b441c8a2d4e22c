"""Weights in float32, networks in bfloat16: what that costs in pictures and gradients. Recomputed activations cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmsec_jax import cli, pipeline
from dmsec_jax.data import images
from dmsec_jax.diffusion.loss import denoising_loss
from dmsec_jax.diffusion.schedule import alpha_bars

PROMPT = "a red dog"
UNIT = 2.0**-8
"""Relative rounding error of bfloat16."""
FAR = 0.2
"""Of gradients through all layers, whose errors pile up: a fifth of the norm, a cosine of 0.98. With these weights it was 0.03 and 0.06."""


@pytest.fixture(scope="module")
def low(tiny_folder):
    return pipeline.load(tiny_folder, compute_dtype="bfloat16")


def kinds(params):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(params)}


def test_only_networks_change_their_type_and_a_tuned_model_follows_its_base(low, tiny_folder):
    assert kinds(low.params) == {"float32"}
    assert (low.configs.unet.dtype, low.configs.text.dtype, low.configs.vae.dtype) == (
        "bfloat16",
        "bfloat16",
        "float32",
    )
    assert low.origin["dtype"] == "bfloat16"
    base = pipeline.load(tiny_folder, compute_dtype="bfloat16", remat="block")
    assert (base.configs.unet.remat, base.configs.vae.remat) == ("block", "block")
    tuned = pipeline.load_tuned(tiny_folder, base)
    assert tuned.configs == base.configs
    assert kinds(tuned.params) == {"float32"}
    half = pipeline.load_tuned(tiny_folder, pipeline.load(tiny_folder, dtype="bfloat16"))
    assert kinds(half.params["unet"]) == {"bfloat16"}
    with pytest.raises(ValueError, match="compute_dtype must be float32 or bfloat16, got 'float16'"):
        pipeline.load(tiny_folder, compute_dtype="float16")


@pytest.mark.slow  # compiles gradients of two networks twice
def test_gradients_of_training_and_of_an_attack_are_close(low, tiny_pipeline, pictures):
    known = jnp.asarray(images.read_folder(pictures, 16).images)
    noise = jax.random.normal(jax.random.key(0), (len(known), *low.latent_shape))
    t = jnp.asarray([50, 300, 600, 900])

    def gradients(model):
        context = jnp.repeat(pipeline.contexts(model, [PROMPT]), len(known), 0)
        functions, alpha_bar = model.functions, alpha_bars(model.schedule)

        def loss(network, image):  # training descends it by its first argument, AdvDM ascends it by its second
            z0, _ = functions.encode_fn(model.params["vae"], image)
            eps_fn = lambda z_t, t: functions.predict_fn(network, z_t, t, context)
            return denoising_loss(eps_fn, alpha_bar, z0, t, noise, model.schedule.prediction_type).mean()

        return jax.jit(jax.grad(loss, (0, 1)))(model.params["unet"], known)

    for found, exact in zip(gradients(low), gradients(tiny_pipeline), strict=True):
        assert kinds(found) == {"float32"}
        found, exact = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, exact))
        assert np.linalg.norm(found - exact) < FAR * np.linalg.norm(exact)


@pytest.mark.slow  # a command twice
def test_a_verb_draws_nearly_the_same_pictures(tiny_folder, pictures, tmp_path):
    options = ["--images", str(pictures), "--prompt", PROMPT, "--model", str(tiny_folder), "--sample-every", "2"]
    options += ["--set", "tune.num_steps=2", "chunk_steps=2", "save_every=2", "patterns=[conv_out]"]
    sheets = []
    for name in ("float32", "bfloat16"):
        out = tmp_path / name
        more = ["--compute-dtype", name, "--remat", "block" if name == "bfloat16" else "none"]
        assert cli.main(["finetune", *options, *more, "--out", str(out)]) == 0
        sheets.append(np.asarray(Image.open(out / "samples" / "step-000002.png"), np.float32))
    difference = np.abs(sheets[0] - sheets[1])
    assert 0 < difference.mean() < 255 * UNIT
    assert difference.max() < 16 * 255 * UNIT
