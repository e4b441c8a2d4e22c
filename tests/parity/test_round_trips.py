"""Tiny Stable Diffusion 1, 2 and XL, made and written by diffusers itself: folder -> our tree -> single file or folder -> diffusers, bit for bit."""

import dataclasses

import numpy as np
import pytest

from dmsec_jax.checkpoints import configs, diffusers, single_file
from dmsec_jax.checkpoints.mapping import to_state
from dmsec_jax.core.trees import flatten
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.models import presets

pytestmark = pytest.mark.torch

SD2 = dataclasses.replace(
    presets.TINY,
    unet=dataclasses.replace(presets.TINY.unet, use_linear_projection=True, attention_head_dim=(2, 4)),
    text=dataclasses.replace(presets.TINY.text, hidden_act="gelu"),
    scheduler=dict(presets.TINY.scheduler) | {"prediction_type": "v_prediction"},
)
PRESETS = {"sd1": presets.TINY, "sd2": SD2, "xl": presets.TINY_XL}


def network(preset, name):
    """The foreign class with random weights, norms and biases included."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    component = diffusers.components(preset)[name]
    options = configs.write_config(getattr(preset, component.field), component.format)
    if component.package == "transformers":
        made = getattr(transformers, component.class_name)(transformers.CLIPTextConfig(**options))
    else:
        options.pop("_class_name")
        made = getattr(library, component.class_name)(**options)
    generator = torch.Generator().manual_seed(len(name))
    for tensor in made.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return made


@pytest.fixture(scope="module", params=PRESETS)
def theirs(request, tmp_path_factory):
    """Their pipeline and the folder that they wrote of it."""
    library, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    preset, place = PRESETS[request.param], tmp_path_factory.mktemp(request.param)
    words = Tokenizer.train(["a red dog"], vocab_size=530, max_length=16)
    words.save(place / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place / "tokenizer")
    text = {"vocab_size": len(words.vocab), "bos_token_id": words.bos_id, "eos_token_id": words.eos_id}
    change = {f: dataclasses.replace(getattr(preset, f), **text) for f in ("text", "text_2") if getattr(preset, f)}
    preset = dataclasses.replace(preset, **change)
    parts = {name: network(preset, name) for name in diffusers.components(preset)}
    parts["scheduler"] = getattr(library, preset.scheduler["_class_name"]).from_config(dict(preset.scheduler))
    parts["tokenizer"] = tokenizer
    if preset.text_2 is None:
        besides = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = library.StableDiffusionPipeline(**parts, **besides)
    else:
        pipe = library.StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    pipe.save_pretrained(place / "model")
    for name in (
        "tokenizer",
        "tokenizer_2",
    ):  # transformers 5 writes tokenizer.json; the parts of old files are kept beside it
        if (place / "model" / name).is_dir():
            words.save(place / "model" / name)
    return pipe, place / "model"


def assert_equal(read, expected):
    assert read.keys() == expected.keys()
    for part in read:
        one, other = flatten(read[part]), flatten(expected[part])
        assert one.keys() == other.keys()
        for path in one:
            np.testing.assert_array_equal(one[path], other[path], err_msg=f"{part}/{path}")


def state_of(made):
    """Weights of a foreign network, without a prefix that transformers 5 has dropped."""
    return {
        key.removeprefix("text_model."): tensor.float().numpy()
        for key, tensor in made.state_dict().items()
        if "position_ids" not in key
    }


def assert_same_there(pipe, params):
    for name, tree in params.items():
        ours = to_state(tree, diffusers.XL[name].rules)
        ours = {key.removeprefix("text_model."): value for key, value in ours.items()}
        found = state_of(getattr(pipe, name))
        assert ours.keys() == found.keys()
        for key, value in found.items():
            np.testing.assert_array_equal(ours[key], value, err_msg=f"{name}: {key}")


def test_their_folder_is_our_tree(theirs):
    pipe, folder = theirs
    model = diffusers.read_model(folder)
    assert_same_there(pipe, model.params)
    assert model.configs.scheduler["prediction_type"] == pipe.scheduler.config.prediction_type


def test_single_file_and_back(theirs, tmp_path):
    library = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    pipe, folder = theirs
    model = diffusers.read_model(folder)
    file = tmp_path / "model.safetensors"
    single_file.write_model(file, model.configs, model.params, "float32")
    assert_equal(single_file.read_params(file, model.configs), model.params)
    again = type(pipe).from_single_file(
        str(file), config=str(folder), local_files_only=True, torch_dtype=torch.float32, safety_checker=None
    )
    assert isinstance(again, library.DiffusionPipeline)
    assert_same_there(again, model.params)


def test_our_folder_and_back(theirs, tmp_path):
    pipe, folder = theirs
    model = diffusers.read_model(folder)
    diffusers.write_model(tmp_path / "ours", model, "float32")
    assert_equal(diffusers.read_model(tmp_path / "ours").params, model.params)
    again = type(pipe).from_pretrained(tmp_path / "ours", local_files_only=True)
    assert_same_there(again, model.params)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_their_half_precision_shards(theirs, tmp_path, suffix):
    torch = pytest.importorskip("torch")
    pipe, folder = theirs
    expected = diffusers.read_model(folder).params
    options = {"max_shard_size": "8KB"} if suffix == "safetensors" else {"safe_serialization": False}
    for name in ("unet", "vae"):
        getattr(pipe, name).half().save_pretrained(tmp_path / name, variant="fp16", **options)
        getattr(pipe, name).to(torch.float32)
        assert all(file.suffix in (f".{suffix}", ".json") for file in (tmp_path / name).iterdir())
        _, params = diffusers.read_component(tmp_path, name, "fp16")
        one, other = flatten(params), flatten(expected[name])
        assert all(np.array_equal(one[path], other[path].astype(np.float16).astype(np.float32)) for path in one)
