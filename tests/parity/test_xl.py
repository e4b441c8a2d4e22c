"""Stable Diffusion XL on tiny random weights: the same prompts, predictions, pictures and adapters in diffusers and here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.checkpoints.adapter_export import write_lora
from dmsec_jax.diffusion.draws import example_noise
from dmsec_jax.finetune.lora import lora
from dmsec_jax.models import conditioning

pytestmark = pytest.mark.torch
PROMPT = "a red dog"


@pytest.fixture(scope="module")
def ours(tiny_xl_folder):
    return pipeline.load(tiny_xl_folder)


@pytest.fixture(scope="module")
def saved(ours, tmp_path_factory):
    """What `pipeline.save` writes."""
    folder = tmp_path_factory.mktemp("xl") / "model"
    pipeline.save(folder, ours)
    return folder


@pytest.fixture
def theirs(saved):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(saved, dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=False, clip_sample=False
    )
    return pipe


def nchw(x):
    import torch

    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def embedded(theirs):
    """(tokens, pooled) of the prompt and of silence."""
    import torch

    with torch.no_grad():
        tokens, silence, pooled, silent = theirs.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=True)
    return (tokens, pooled), (silence, silent)


def predicted(theirs, z_t, t):
    import torch

    (tokens, pooled), _ = embedded(theirs)
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    with torch.no_grad():
        out = theirs.unet(nchw(z_t), torch.tensor([t]), encoder_hidden_states=tokens, added_cond_kwargs=told).sample
    return np.moveaxis(out.numpy(), 1, -1)


_predict = jax.jit(lambda params, z_t, t, context, fn: fn(params, z_t, t, context), static_argnums=4)


def prediction(model, z_t, t):
    return _predict(
        model.params["unet"], z_t, jnp.array([t]), pipeline.contexts(model, [PROMPT]), model.functions.predict_fn
    )


@pytest.fixture(scope="module")
def z_t(ours):
    return jax.random.normal(jax.random.key(1), (1, *ours.latent_shape))


def test_prompts_and_predictions(ours, theirs, z_t):
    for packed, parts in zip(pipeline.contexts(ours, [PROMPT, ""]), embedded(theirs), strict=True):
        tokens, pooled, _ = conditioning.unpack(packed[None], ours.configs.unet.pooled_width)
        for one, other in zip((tokens, pooled), parts, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
    np.testing.assert_allclose(prediction(ours, z_t, 300), predicted(theirs, z_t, 300), atol=1e-4)


def test_a_guided_picture(ours, theirs):
    key = jax.random.key(5)
    picture = pipeline.sample(key, ours, PROMPT, 1, num_steps=4, guidance_weight=3.0)
    options = {"latents": nchw(example_noise(key, jnp.arange(1), ours.latent_shape)), "height": 16, "width": 16}
    expected = theirs(PROMPT, num_inference_steps=4, guidance_scale=3.0, output_type="np", **options).images
    np.testing.assert_allclose((picture + 1) / 2, expected, atol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_our_lora_loads_there(ours, theirs, z_t, tmp_path, layout):
    """For the UNet and both text encoders."""
    key = jax.random.key(1)
    trees = {"unet": lora(2, None, "attention").init(key, ours.params["unet"])}
    for part in ("text_encoder", "text_encoder_2"):
        trees[part] = lora(2, None, "text-attention").init(key, ours.params[part])
    leaves, structure = jax.tree.flatten(trees)
    noise = [leaf + 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
    write_lora(tmp_path / "lora.safetensors", jax.tree.unflatten(structure, noise), 2.0, layout)
    tuned = pipeline.load_tuned(tmp_path / "lora.safetensors", ours)
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    (tokens, pooled), _ = embedded(theirs)
    found = conditioning.unpack(pipeline.contexts(tuned, [PROMPT]), 16)
    np.testing.assert_allclose(found[0], tokens.numpy(), atol=1e-4)
    np.testing.assert_allclose(found[1], pooled.numpy(), atol=1e-4)
    assert jnp.abs(found[1] - conditioning.unpack(pipeline.contexts(ours, [PROMPT]), 16)[1]).max() > 0.01
    np.testing.assert_allclose(prediction(tuned, z_t, 300), predicted(theirs, z_t, 300), atol=1e-4)
    assert jnp.abs(prediction(tuned, z_t, 300) - prediction(ours, z_t, 300)).max() > 0.01


def test_learnt_words_mean_the_same_there(ours, theirs, tmp_path):
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    pair = {"clip_l": draw.normal(size=(2, 8)), "clip_g": draw.normal(size=(2, 12))}
    pair = {key: torch.tensor(value, dtype=torch.float32) for key, value in pair.items()}
    torch.save(pair, tmp_path / "style.pt")
    words = pipeline.with_words(ours, [tmp_path / "style.pt"])
    for key, tokenizer, encoder in (
        ("clip_l", "tokenizer", "text_encoder"),
        ("clip_g", "tokenizer_2", "text_encoder_2"),
    ):
        parts = {"text_encoder": getattr(theirs, encoder), "tokenizer": getattr(theirs, tokenizer)}
        theirs.load_textual_inversion(pair[key], token="style", **parts)
    prompt = "a style dog"
    tokens, _, pooled, _ = theirs.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=True)
    found = conditioning.unpack(pipeline.contexts(words, [prompt]), 16)
    np.testing.assert_allclose(found[0], tokens.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(found[1], pooled.detach().numpy(), atol=1e-4)


def test_half_precision_stays_close(ours, tiny_xl_folder, z_t):
    low = pipeline.load(tiny_xl_folder, dtype="bfloat16")
    one, other = prediction(low, z_t, 300), prediction(ours, z_t, 300)
    assert 1e-4 < float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other)) < 0.1
    assert dataclasses.asdict(low.configs.vae) == dataclasses.asdict(ours.configs.vae)
