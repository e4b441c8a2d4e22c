"""From files to a pipeline: Stable Diffusion XL, single files, learnt words, models that fit in part."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax import loading, pipeline
from dmsec_jax.checkpoints import single_file
from dmsec_jax.checkpoints.adapter_export import write_lora
from dmsec_jax.checkpoints.io import read_tensors, write_tensors
from dmsec_jax.commands import extract
from dmsec_jax.core import spread
from dmsec_jax.core.trees import flatten
from dmsec_jax.loading import Reading
from dmsec_jax.models import conditioning

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def xl(tiny_xl_folder):
    return pipeline.load(tiny_xl_folder)


@pytest.mark.slow  # traces four networks
def test_a_context_of_xl_holds_tokens_pooled_text_and_sizes(xl):
    packed = pipeline.contexts(xl, ["", "a red dog"])
    tokens, pooled, sizes = conditioning.unpack(packed, xl.configs.unet.pooled_width)
    assert (tokens.shape, pooled.shape) == ((2, 16, 20), (2, 16))
    np.testing.assert_array_equal(sizes, [[16, 16, 0, 0, 16, 16]] * 2)
    assert not tokens[0].any()
    assert not pooled[0].any()
    assert tokens[1].any()
    spoken = dataclasses.replace(xl, configs=dataclasses.replace(xl.configs, silent_empty=False))
    assert conditioning.unpack(pipeline.contexts(spoken, [""]), 16)[1].any()


@pytest.mark.slow  # traces four networks
def test_xl_in_one_file_is_the_same_model(xl, tmp_path, monkeypatch):
    file = tmp_path / "xl.safetensors"
    single_file.write_model(file, xl.configs, jax.device_get(xl.params), "float32")
    monkeypatch.setattr(single_file, "preset_of", lambda *_: xl.configs)
    read = pipeline.load(file, tokenizer=xl.tokenizer_folder, prediction_type="epsilon")
    jax.tree.map(np.testing.assert_array_equal, read.params, xl.params)
    assert (read.tokenizer.pad, read.tokenizer_2.pad) == ("<|endoftext|>", "!")
    np.testing.assert_array_equal(read.tokenizer_2.encode(["a dog"]), xl.tokenizer_2.encode(["a dog"]))
    tuned = pipeline.load_tuned(file, xl)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, xl.params)


@pytest.mark.slow  # traces four networks
def test_parameters_in_half_precision_but_for_the_autoencoder(tiny_xl_folder):
    read = pipeline.load(tiny_xl_folder, dtype="bfloat16")
    kinds = {part: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} for part, tree in read.params.items()}
    assert kinds.pop("vae") == {"float32"}
    assert set.union(*kinds.values()) == {"bfloat16"}
    assert {read.configs.unet.dtype, read.configs.text.dtype, read.configs.text_2.dtype} == {"bfloat16"}


def test_parameters_lie_where_the_plan_says(tiny_folder, monkeypatch):
    monkeypatch.setattr(spread, "SMALL", 64)
    mesh = loading.parallel.make_mesh("data=4,fsdp=2")
    read = pipeline.load(tiny_folder, mesh=mesh)
    plan = loading.parallel.plan(read.params, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, where: leaf.sharding == where, read.params, plan))
    assert any("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(read.params))


def add_average(file):
    """Weights of the UNet, one higher each, as the running average that some training kept in the same file."""
    state = {key: np.array(value) for key, value in single_file.read(file).items()}
    own = {key.removeprefix("model.").replace(".", ""): v for key, v in state.items() if key.startswith("model.diff")}
    write_tensors(file, state | {f"model_ema.{key}": value + 1 for key, value in own.items()})


def test_the_average_of_a_single_file(tiny_pipeline, tmp_path):
    file = tmp_path / "model.safetensors"
    single_file.write_model(file, tiny_pipeline.configs, jax.device_get(tiny_pipeline.params), "float32")
    add_average(file)
    average = pipeline.load_tuned(file, tiny_pipeline, weights="model_ema").params["unet"]
    jax.tree.map(
        lambda one, other: np.testing.assert_array_equal(one, other + 1), average, tiny_pipeline.params["unet"]
    )
    same = pipeline.load_tuned(file, tiny_pipeline).params["unet"]
    jax.tree.map(np.testing.assert_array_equal, same, tiny_pipeline.params["unet"])


def test_options_that_only_the_base_model_can_follow_are_its_own(
    tiny_folder, tiny_pipeline, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(single_file, "preset_of", lambda *_: tiny_pipeline.configs)
    raised = lambda one: np.array_equal(unet_bias(one), unet_bias(tiny_pipeline) + 1)
    unet_bias = lambda one: np.asarray(one.params["unet"]["conv_out"]["bias"])
    own = shutil.copytree(tiny_folder, tmp_path / "own")
    for path in own.rglob("*.safetensors"):
        path.rename(path.with_suffix(".non_ema.safetensors"))
    assert not any(map(raised, extract.both(own, tiny_folder, Reading(variant="non_ema"), pictures, 1.0, ())))
    file = tmp_path / "model.safetensors"
    single_file.write_model(file, tiny_pipeline.configs, jax.device_get(tiny_pipeline.params), "float32")
    average = Reading(weights="model_ema", tokenizer=tiny_folder / "tokenizer", prediction_type="epsilon")
    of_folder = dataclasses.replace(average, tokenizer=None, prediction_type=None)
    with pytest.raises(ValueError, match="missing"):  # neither has an average
        extract.both(tiny_folder, file, of_folder, pictures, 1.0, ())
    add_average(file)
    which = lambda *models: list(map(raised, extract.both(*models, pictures, 1.0, ())))
    assert which(file, tiny_folder, average) == [True, False]
    assert which(tiny_folder, file, of_folder) == [False, True]
    assert which(file, file, average) == [True, True]


def test_strength_of_an_adapter(tiny_pipeline, tmp_path):
    file = tmp_path / "lora.safetensors"
    factors = {"down": np.ones((32, 2), np.float32), "up": np.ones((2, 32), np.float32)}
    write_lora(file, {"unet": {"time_embedding": {"linear_2": factors}}})
    for strength in (0.0, 0.25):
        tuned = pipeline.load_tuned(file, tiny_pipeline, strength=strength)
        kernels = [model.params["unet"]["time_embedding"]["linear_2"]["kernel"] for model in (tuned, tiny_pipeline)]
        np.testing.assert_allclose(kernels[0] - kernels[1], 2 * strength, atol=1e-6)


def test_a_model_that_fits_in_part_is_read_only_on_demand(tiny_folder, tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    state = {key: np.array(value) for key, value in read_tensors(folder / UNET_FILE).items()}
    del state["conv_out.bias"]
    state["extra"], state["conv_in.bias"] = np.ones(3, np.float32), np.ones(5, np.float32)
    state["conv_out.weight"] += 1
    write_tensors(folder / UNET_FILE, state)
    with pytest.raises(ValueError, match="1 mis-shaped, 1 missing, 1 unused"):
        pipeline.load_tuned(folder, tiny_pipeline)
    with pytest.raises(ValueError, match="2 missing, and in no base model"):
        pipeline.load(folder, allow_partial=True)
    tuned = pipeline.load_tuned(folder, tiny_pipeline, allow_partial=True)
    one, other = flatten(tuned.params["unet"]), flatten(tiny_pipeline.params["unet"])
    assert one.keys() == other.keys()
    np.testing.assert_array_equal(one["conv_in/bias"], other["conv_in/bias"])
    np.testing.assert_allclose(one["conv_out/kernel"], other["conv_out/kernel"] + 1, atol=1e-6)
    (note,) = pipeline.misfits("fine-tuned", tuned)
    assert "read in part (--allow-partial), 3 problems" in note
    for text in ("unused: unet: extra [3]", "missing: unet: conv_out.bias [4]", "mis-shaped: unet: conv_in.bias [5]"):
        assert text in note
    assert not pipeline.misfits("base", tiny_pipeline)


def test_learnt_words_are_spoken(tiny_pipeline, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    write_tensors(tmp_path / "style.safetensors", {"emb_params": vectors})
    words = pipeline.with_words(tiny_pipeline, [tmp_path / "style.safetensors"])
    size = tiny_pipeline.configs.text.vocab_size
    before, ids = tiny_pipeline.tokenizer.encode(["a  dog"])[0], words.tokenizer.encode(["a Style dog"])[0]
    assert ids.tolist() == [*before[:2], size, size + 1, *before[2:-2]]
    np.testing.assert_array_equal(
        words.tokenizer.encode(["a styledog"]), tiny_pipeline.tokenizer.encode(["a styledog"])
    )
    table = words.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[size:], vectors)
    np.testing.assert_allclose(
        pipeline.contexts(words, ["a dog"]), pipeline.contexts(tiny_pipeline, ["a dog"]), atol=1e-6
    )
    with pytest.raises(ValueError, match="must be of new words, got 'style'"):
        pipeline.with_words(words, [tmp_path / "style.safetensors"])
    with pytest.raises(ValueError, match="without words of textual inversion"):
        pipeline.save(tmp_path / "model", words)


@pytest.mark.slow  # traces four networks
def test_words_of_xl_reach_both_text_encoders(xl, tmp_path):
    pair = {"clip_l": np.ones((1, 8), np.float32), "clip_g": np.ones((1, 12), np.float32)}
    write_tensors(tmp_path / "style.safetensors", pair)
    words = pipeline.with_words(xl, [tmp_path / "style.safetensors"])
    packed = pipeline.contexts(words, ["a style", "a"])
    tokens, pooled, _ = conditioning.unpack(packed, 16)
    assert bool(jnp.abs(tokens[0] - tokens[1])[:, 8:].max() > 1e-3)
    assert bool(jnp.abs(pooled[0] - pooled[1]).max() > 1e-3)


@pytest.mark.slow  # traces four networks
def test_two_text_encoders_are_not_trained(xl):
    from dmsec_jax import tuning

    with pytest.raises(ValueError, match="text_encoder must be false for a model with two text encoders"):
        tuning.tune(jax.random.key(0), xl, np.zeros((1, 16, 16, 3)), ["a"], tuning.DEFAULT, text_encoder=True)


@pytest.mark.slow  # compiles two networks of the embedded model
def test_pictures_tell_what_a_single_file_predicts(tmp_path, monkeypatch):
    """The embedded model predicts velocity; as weights alone do not say so, its losses on its own pictures must."""
    from dmsec_jax.data import images

    model = pipeline.load()
    file = tmp_path / "emoji.safetensors"
    single_file.write_model(file, model.configs, jax.device_get(model.params), "float32")
    monkeypatch.setattr(single_file, "preset_of", lambda *_: model.configs)
    shown = images.read_folder(pipeline.EMBEDDED.parent / "openmoji-animals" / "member", 64).images
    read = pipeline.load(file, tokenizer=model.tokenizer_folder, pictures=lambda side: shown)
    assert read.schedule.prediction_type == read.configs.scheduler["prediction_type"] == "v_prediction"
    found = loading._losses(
        model.params, jnp.asarray(shown[:8]), pipeline.contexts(model, [""]), model.schedule, model.functions
    )
    print("share of noise and of velocity left unexplained:", *(f"{float(jnp.mean(part)):.3f}" for part in found))
    with pytest.raises(ValueError, match="give --prediction-type epsilon or v_prediction"):
        pipeline.load(file, tokenizer=model.tokenizer_folder)
