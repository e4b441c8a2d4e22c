"""The embedded model in PyTorch diffusers and here: the same weights give the same predictions and the same pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.diffusion.draws import example_noise

pytestmark = pytest.mark.torch
PROMPT = "a twemoji icon of a red heart"


@pytest.fixture(scope="module")
def ours():
    return pipeline.load()


@pytest.fixture(scope="module")
def theirs():
    diffusers = pytest.importorskip("diffusers")
    import torch

    loaded = diffusers.StableDiffusionPipeline.from_pretrained(str(pipeline.EMBEDDED), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded.to("cpu")


def nchw(x):
    import torch

    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def test_prompts_encode_alike(ours, theirs):
    import torch

    ids = theirs.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    np.testing.assert_array_equal(ours.tokenizer.encode([PROMPT]), ids.numpy())
    with torch.no_grad():
        expected = theirs.text_encoder(ids)[0].numpy()
    np.testing.assert_allclose(pipeline.contexts(ours, [PROMPT]), expected, atol=1e-4)


def test_unet_and_autoencoder_agree(ours, theirs):
    import torch

    z_t = jax.random.normal(jax.random.key(0), (2, *ours.latent_shape))
    context = jnp.repeat(pipeline.contexts(ours, [PROMPT]), 2, axis=0)
    found = jax.jit(ours.functions.predict_fn)(ours.params["unet"], z_t, jnp.array([10, 900]), context)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    mean, _ = pipeline.encode(ours, images)
    with torch.no_grad():
        expected = theirs.unet(nchw(z_t), torch.tensor([10, 900]), torch.from_numpy(np.array(context))).sample
        latent = theirs.vae.encode(nchw(images)).latent_dist.mean
        decoded = theirs.vae.decode(latent).sample
    np.testing.assert_allclose(np.moveaxis(np.asarray(found), -1, 1), expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(np.moveaxis(np.asarray(mean), -1, 1), latent.numpy(), atol=1e-3)
    picture = np.moveaxis(pipeline.decode(ours, mean), -1, 1)
    np.testing.assert_allclose(picture, np.clip(decoded.numpy(), -1, 1), atol=1e-3)


@pytest.mark.parametrize("weight", [None, 3.0])
def test_a_sample_of_25_steps_is_the_same_picture(ours, theirs, weight):
    key = jax.random.key(5)
    picture = pipeline.sample(key, ours, PROMPT, 1, num_steps=25, guidance_weight=weight)
    noise = example_noise(key, jnp.arange(1), ours.latent_shape)
    options = {"latents": nchw(noise), "height": 64, "width": 64, "output_type": "np"}
    expected = theirs(PROMPT, num_inference_steps=25, guidance_scale=weight or 1.0, **options).images
    assert np.abs((picture + 1) / 2 - expected).mean() < 1 / 255
