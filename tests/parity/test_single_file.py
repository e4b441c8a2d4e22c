"""Single files between PyTorch and here: diffusers opens ours with the same weights, and what torch.save writes opens here."""

import json

import numpy as np
import pytest

from dmsec_jax.checkpoints import diffusers, single_file
from dmsec_jax.checkpoints.mapping import to_tree
from dmsec_jax.core.trees import flatten

pytestmark = pytest.mark.torch


def assert_equal(read, expected):
    one, other = flatten(read), flatten(expected)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.fixture(params=[False, True], ids=["clip", "open clip"])
def model(tiny_folder, tmp_path, request):
    """A tiny model of each family, in a folder of its own."""
    if not request.param:
        return diffusers.read_model(tiny_folder), tiny_folder
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    options = {"text_encoder": {"hidden_act": "gelu"}, "unet": {"use_linear_projection": True}}
    for name, changes in options.items():
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return diffusers.read_model(folder), folder


def test_diffusers_opens_our_file(model, tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("diffusers")
    model, folder = model
    path = tmp_path / "model.safetensors"
    single_file.write_model(path, model.configs, model.params, "float32")
    for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        network = getattr(library, kind).from_single_file(
            str(path), config=str(folder), subfolder=name, local_files_only=True, torch_dtype=torch.float32
        )
        state = {key: value.numpy() for key, value in network.state_dict().items()}
        component = diffusers.COMPONENTS[name]
        target = diffusers.shapes(name, getattr(model.configs, component.field))
        assert_equal(to_tree(state, component.rules, target), model.params[name])


def test_text_encoder_is_read_as_diffusers_reads_it(model, tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    torch = pytest.importorskip("torch")
    model, folder = model
    path = tmp_path / "model.safetensors"
    single_file.write_model(path, model.configs, model.params, "float32")
    state = {key: torch.from_numpy(np.array(value)) for key, value in single_file.read(path).items()}
    if model.configs.text.hidden_act == "gelu":
        import transformers

        network = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        converted = convert_open_clip_checkpoint(network, state, prefix="cond_stage_model.model.")
    else:
        converted = convert_ldm_clip_checkpoint(state)
    found = {key: value.numpy() for key, value in converted.items()}
    component = diffusers.COMPONENTS["text_encoder"]
    target = diffusers.shapes("text_encoder", model.configs.text)
    assert_equal(to_tree(found, component.rules, target), model.params["text_encoder"])


def test_checkpoint_of_torch(model, tmp_path):
    torch = pytest.importorskip("torch")
    model, _ = model
    single_file.write_model(tmp_path / "model.safetensors", model.configs, model.params, "float32")
    state = {key: torch.from_numpy(np.array(v)) for key, v in single_file.read(tmp_path / "model.safetensors").items()}
    torch.save({"state_dict": state, "global_step": 3, "epoch": 0}, tmp_path / "model.ckpt")
    read = single_file.read_params(tmp_path / "model.ckpt", model.configs)
    for name in read:
        assert_equal(read[name], model.params[name])
