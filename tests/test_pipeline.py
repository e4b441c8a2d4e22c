"""The pipeline on a random tiny model: reading, encoding, sampling, pairs of models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import pipeline
from dmsec_jax.checkpoints import single_file
from dmsec_jax.checkpoints.adapter_export import write_lora
from dmsec_jax.core.files import sha256
from dmsec_jax.models import presets

PROMPT = "a red dog"


def pictures(count):
    return np.random.default_rng(0).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)


def test_saved_pipeline_loads_with_equal_weights_and_shared_functions(tiny_pipeline, tmp_path):
    pipeline.save(tmp_path / "copy", tiny_pipeline)
    again = pipeline.load(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, again.params, tiny_pipeline.params)
    assert again.functions is tiny_pipeline.functions, "one architecture must compile once"
    assert again.schedule == tiny_pipeline.schedule


def test_vocabulary_larger_than_the_text_encoder_is_refused(tiny_folder, tmp_path):
    import json
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "config.json"
    small = json.loads(file.read_text()) | {"vocab_size": 10}
    file.write_text(json.dumps(small))
    with pytest.raises(ValueError, match="token_embedding|vocabulary"):
        pipeline.load(tmp_path / "model")


def test_encoding_does_not_depend_on_the_batch_size(tiny_pipeline):
    mean, logvar = pipeline.encode(tiny_pipeline, pictures(5), batch_size=2)
    whole_mean, whole_logvar = pipeline.encode(tiny_pipeline, pictures(5), batch_size=5)
    assert mean.shape == (5, *tiny_pipeline.latent_shape)
    np.testing.assert_allclose(mean, whole_mean, atol=1e-5)
    np.testing.assert_allclose(logvar, whole_logvar, atol=1e-5)


def test_encoding_refuses_pictures_of_another_range(tiny_pipeline):
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\]"):
        pipeline.encode(tiny_pipeline, pictures(1) * 255)


@pytest.mark.slow  # compiles for long
@pytest.mark.parametrize("weight", [None, 3.0])
def test_sampling_does_not_depend_on_the_batch_size(tiny_pipeline, weight):
    draw = lambda size: pipeline.sample(
        jax.random.key(0), tiny_pipeline, PROMPT, 3, num_steps=2, guidance_weight=weight, batch_size=size
    )
    np.testing.assert_allclose(draw(2), draw(3), atol=1e-4)


@pytest.mark.slow  # compiles for long
def test_guidance_of_weight_one_is_plain_sampling(tiny_pipeline):
    draw = lambda weight: pipeline.sample(
        jax.random.key(0), tiny_pipeline, PROMPT, 2, num_steps=2, guidance_weight=weight
    )
    np.testing.assert_allclose(draw(1.0), draw(None), atol=1e-4)
    assert np.abs(draw(5.0) - draw(None)).max() > 1e-3


@pytest.mark.slow  # compiles for long
def test_stacked_pair_equals_two_networks_in_turn(tiny_pipeline, monkeypatch):
    empty, prompt = pipeline.contexts(tiny_pipeline, ["", PROMPT])[:, None]
    other = jax.tree.map(lambda leaf: leaf * 1.1, tiny_pipeline.params["unet"])
    z_t = jax.random.normal(jax.random.key(1), (2, *tiny_pipeline.latent_shape))
    networks = (tiny_pipeline, (tiny_pipeline.params["unet"], empty), (other, prompt))

    def predictions():
        pair_fn, params = pipeline.pair(*networks)
        return jax.jit(pair_fn)(params, z_t, jnp.full(2, 500))

    stacked = predictions()
    monkeypatch.setattr(pipeline, "STACKED_LIMIT", 0)
    for a, b in zip(stacked, predictions(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(stacked[0] - stacked[1]).max() > 1e-3


def test_prompt_beyond_the_context_is_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="prompt must be at most"):
        pipeline.contexts(tiny_pipeline, ["dog " * 100])


def test_not_finite_latents_decode_to_nan_not_to_pictures(tiny_pipeline):
    latents = np.zeros((2, *tiny_pipeline.latent_shape), np.float32)
    latents[1] = np.nan
    decoded = pipeline.decode(tiny_pipeline, latents)
    assert np.isfinite(decoded[0]).all()
    assert np.isnan(decoded[1]).any()


def test_size_properties(tiny_pipeline):
    assert tiny_pipeline.pixels == 16
    assert dataclasses.replace(tiny_pipeline).latent_shape == (8, 8, 4)


def test_a_lora_is_loaded_on_top_of_its_base(tiny_pipeline, tmp_path):
    file = tmp_path / "lora.safetensors"
    factors = {"down": np.ones((32, 2), np.float32), "up": np.ones((2, 32), np.float32)}
    write_lora(file, {"unet": {"time_embedding": {"linear_2": factors}}}, ratio=0.5)
    tuned = pipeline.load_tuned(file, tiny_pipeline)
    assert tuned.sha256 == sha256(file)
    changed = jax.tree.map(lambda new, old: np.abs(new - old).max(), tuned.params, tiny_pipeline.params)
    assert changed["unet"]["time_embedding"]["linear_2"].pop("kernel") == pytest.approx(1)
    assert not any(jax.tree.leaves(changed))
    pipeline.require_same_architecture(tiny_pipeline, tuned)


def test_a_tuned_folder_must_be_of_the_base_architecture(tiny_pipeline, tiny_folder):
    assert pipeline.load_tuned(tiny_folder, tiny_pipeline).sha256 == tiny_pipeline.sha256
    other = dataclasses.replace(
        tiny_pipeline, configs=dataclasses.replace(tiny_pipeline.configs, unet=presets.NANO.unet)
    )
    with pytest.raises(ValueError, match="of the architecture of"):
        pipeline.load_tuned(tiny_folder, other)


def test_a_single_file_is_loaded_with_the_configs_of_its_base(tiny_pipeline, tmp_path):
    path = tmp_path / "model.safetensors"
    single_file.write_model(path, tiny_pipeline.configs, tiny_pipeline.params, "float32")
    tuned = pipeline.load_tuned(path, tiny_pipeline)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, tiny_pipeline.params)
    with pytest.raises(ValueError, match="give --prediction-type epsilon or v_prediction"):
        pipeline.load(path)
