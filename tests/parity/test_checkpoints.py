"""Folders of PyTorch diffusers open here with equal weights, and ours open there."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints import configs
from dmsec_jax.checkpoints.diffusers import COMPONENTS, Model, read_component, read_model, shapes, write_model
from dmsec_jax.checkpoints.io import read_tensors, write_tensors
from dmsec_jax.checkpoints.mapping import align, to_state
from dmsec_jax.core.trees import flatten, map_paths
from dmsec_jax.models import presets

pytestmark = pytest.mark.torch

LINEAR = dataclasses.replace(
    presets.TINY,
    unet=dataclasses.replace(presets.TINY.unet, use_linear_projection=True, attention_head_dim=(2, 4)),
    text=dataclasses.replace(presets.TINY.text, hidden_act="gelu"),
)
PRESETS = {"convolution": presets.TINY, "linear": LINEAR}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def config_of(preset, name):
    return getattr(preset, COMPONENTS[name].field)


def torch_network(preset, name, device="cpu"):
    torch = pytest.importorskip("torch")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    options = configs.write_config(config_of(preset, name), COMPONENTS[name].format)
    with torch.device(device):
        if name == "text_encoder":
            options.pop("architectures")
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**options))
        options.pop("_class_name")
        return getattr(diffusers, COMPONENTS[name].class_name)(**options)


def randomise(network, seed=0):
    """Values that are all different, norms and biases included."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return network


def tokenizer(folder):
    """A CLIP tokenizer of single bytes."""
    transformers = pytest.importorskip("transformers")
    printable = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 598, "<|endoftext|>": 599}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module", params=PRESETS)
def ours(request, tmp_path_factory):
    """(our model, the folder that we wrote of it)."""
    preset, draw = PRESETS[request.param], np.random.default_rng(0)
    fill = lambda _, leaf: (0.1 * draw.normal(size=leaf.shape)).astype(np.float32)
    params = {name: map_paths(fill, shapes(name, config_of(preset, name))) for name in COMPONENTS}
    model = Model(configs=preset, params=params, tokenizer=tokenizer(tmp_path_factory.mktemp("tokenizer")))
    folder = tmp_path_factory.mktemp("ours") / "model"
    write_model(folder, model, "float32")
    return model, folder


def assert_same_weights(network, name, params):
    """Every tensor of the PyTorch network equals the one that our tree gives its key."""
    state = {key.removeprefix("text_model."): v for key, v in to_state(params, COMPONENTS[name].rules).items()}
    theirs = {
        key.removeprefix("text_model."): v for key, v in network.state_dict().items() if "position_ids" not in key
    }
    assert state.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(state[key], value.float().numpy(), err_msg=key)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", COMPONENTS)
def test_their_folder_opens_here(tmp_path, name, preset, shard, variant):
    network = randomise(torch_network(PRESETS[preset], name))
    network = network.half() if variant else network
    options = {"max_shard_size": "8KB"} if shard else {}
    network.save_pretrained(tmp_path / name, variant=variant, **options)
    assert any("index" in file.name for file in (tmp_path / name).iterdir()) == shard
    cfg, params = read_component(tmp_path, name, variant)
    assert cfg == config_of(PRESETS[preset], name)
    assert_same_weights(network, name, params)


def test_their_pickles_give_tensors_and_nothing_else(tmp_path):
    network = randomise(torch_network(presets.TINY, "vae"))
    network.save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert_same_weights(network, "vae", read_component(tmp_path, "vae")[1])


def test_our_folder_opens_in_their_pipeline_and_paints(ours):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model, folder = ours
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for name in COMPONENTS:
        assert_same_weights(getattr(pipe, name), name, model.params[name])
    assert type(pipe.scheduler).__name__ == model.configs.scheduler["_class_name"]
    assert pipe.scheduler.config.beta_end == model.configs.scheduler["beta_end"]
    assert pipe.safety_checker is None
    assert not pipe.config.requires_safety_checker
    pipe.set_progress_bar_config(disable=True)
    size = model.configs.vae.sample_size
    image = pipe("a cat", num_inference_steps=2, height=size, width=size, output_type="np").images
    assert image.shape == (1, size, size, 3)
    assert np.isfinite(image).all()
    assert torch.is_tensor(pipe.unet.conv_in.weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards_open_there(ours, tmp_path, dtype):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    model, _ = ours
    write_model(tmp_path / "m", model, dtype, shard_bytes=8_000)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), dict(model.params))
    for asked in (torch.float32, getattr(torch, dtype)):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m", torch_dtype=asked)
        for name in COMPONENTS:
            assert getattr(pipe, name).dtype == asked
            assert_same_weights(getattr(pipe, name), name, expected[name])


def test_pipeline_that_they_saved_again_opens_here(ours, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model, folder = ours
    diffusers.StableDiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    read = read_model(tmp_path / "again")
    assert [getattr(read.configs, f) == getattr(model.configs, f) for f in ("unet", "vae", "text")] == [True] * 3
    for name in COMPONENTS:
        one, other = flatten(read.params[name]), flatten(model.params[name])
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[path], other[path]) for path in one)


def test_old_attention_names_of_the_autoencoder_mean_the_same_as_there(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    network = randomise(torch_network(presets.TINY, "vae"))
    network.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in read_tensors(path).items():
        for new, was in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{new}.", f".{was}.")
        old[key] = np.array(value)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    write_tensors(path, old, metadata={"format": "pt"})
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert_same_weights(theirs, "vae", read_component(tmp_path, "vae")[1])
    assert_same_weights(network, "vae", read_component(tmp_path, "vae")[1])


@pytest.mark.parametrize("preset", ["SD15", "SD21", "NANO"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_full_size_networks_have_their_names_and_shapes(name, preset):
    preset = getattr(presets, preset)
    theirs = {key: tuple(v.shape) for key, v in torch_network(preset, name, "meta").state_dict().items()}
    target, rules = shapes(name, config_of(preset, name)), COMPONENTS[name].rules
    zeros = lambda shape: np.broadcast_to(np.float32(0), shape)
    align({key: zeros(shape) for key, shape in theirs.items()}, rules, target)
    ours = to_state(map_paths(lambda _, leaf: zeros(leaf.shape), target), rules)
    assert {key.removeprefix(rules.prefix): v.shape for key, v in ours.items()} == {
        key.removeprefix(rules.prefix): shape for key, shape in theirs.items() if "position_ids" not in key
    }


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_tables_of_options_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    fmt = COMPONENTS[name].format
    signature = inspect.signature(getattr(diffusers, COMPONENTS[name].class_name).__init__).parameters
    theirs = {key: p.default for key, p in signature.items() if key != "self"}
    assert theirs.keys() == fmt.absent.keys() | fmt.fixed.keys() | fmt.repeated.keys() | fmt.ignored
    for key, default in (fmt.absent | fmt.fixed).items():
        assert theirs[key] == default, key


def test_table_of_text_options_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    fmt, theirs = configs.TEXT_ENCODER, transformers.CLIPTextConfig().to_dict()
    known = fmt.absent.keys() | fmt.fixed.keys() | fmt.ignored
    assert {key for key in theirs if not key.startswith("_")} <= known
    assert {key: theirs[key] for key in fmt.absent} == fmt.absent
