import dataclasses
import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints.diffusers import XL, Model, components, read_component, read_model, shapes, write_model
from dmsec_jax.checkpoints.io import read_metadata, read_tensors, write_tensors
from dmsec_jax.core.trees import flatten, map_paths
from dmsec_jax.diffusion.schedule import from_scheduler_json
from dmsec_jax.models import presets

DIFFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"


def config_of(preset, name):
    return getattr(preset, XL[name].field)


def filled(preset, tmp_path_factory):
    draw = np.random.default_rng(0)
    fill = lambda _, leaf: draw.normal(size=leaf.shape).astype(np.float32)
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    for name, text in {"vocab.json": "{}", "merges.txt": "", "private.txt": "secret"}.items():
        (tokenizer / name).write_text(text)
    params = {name: map_paths(fill, shapes(name, config_of(preset, name))) for name in components(preset)}
    return Model(configs=preset, params=params, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return filled(presets.TINY, tmp_path_factory)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder, model, "float32", metadata={"steps": "3"})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "tiny")


def assert_params(read, expected, cast="float32"):
    read, expected = flatten(read), flatten(expected)
    assert read.keys() == expected.keys()
    for path in read:
        assert read[path].dtype == np.float32
        np.testing.assert_array_equal(read[path], expected[path].astype(cast).astype(np.float32))


def test_whole_model_comes_back(model, written):
    read = read_model(written)
    assert_params(read.params, model.params)
    networks = [(getattr(read.configs, f), getattr(model.configs, f)) for f in ("unet", "vae", "text")]
    assert all(one == other for one, other in networks)
    assert from_scheduler_json(read.configs.scheduler) == from_scheduler_json(model.configs.scheduler)
    assert sorted(file.name for file in read.tokenizer.iterdir()) == ["merges.txt", "vocab.json"]


@pytest.mark.slow  # traces four networks
def test_xl_comes_back_with_both_text_encoders(tmp_path_factory, tmp_path):
    model = filled(presets.TINY_XL, tmp_path_factory)
    write_model(tmp_path / "m", model, "float32")
    read = read_model(tmp_path / "m")
    assert_params(read.params, model.params)
    assert read.configs.silent_empty
    assert all(getattr(read.configs, f) == getattr(model.configs, f) for f in ("unet", "vae", "text", "text_2"))
    assert sorted(file.name for file in read.tokenizer_2.iterdir()) == ["merges.txt", "vocab.json"]
    change_json(tmp_path / "m" / "text_encoder_2" / "config.json", projection_dim=8)
    with pytest.raises(ValueError, match="pooled embedding of unet must be 8 wide, as in text_encoder_2, got 16"):
        read_model(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_and_shards(model, tmp_path, dtype):
    write_model(tmp_path / "m", model, dtype, shard_bytes=20_000)
    assert (tmp_path / "m" / "unet" / f"{DIFFUSION_WEIGHTS}.index.json").is_file()
    assert_params(read_model(tmp_path / "m").params, model.params, dtype)


def test_jax_arrays_are_written_too(model, tmp_path):
    write_model(tmp_path / "m", dataclasses.replace(model, params=jax.tree.map(jax.numpy.asarray, dict(model.params))))
    assert_params(read_model(tmp_path / "m").params, model.params, "float16")


def test_text_encoder_is_written_with_the_prefix_that_other_programs_expect(written):
    assert all(key.startswith("text_model.") for key in read_tensors(written / "text_encoder" / "model.safetensors"))
    assert read_metadata(written / "text_encoder" / "model.safetensors") == {"format": "pt", "steps": "3"}


def test_variant_files(model, folder):
    os.remove(folder / "vae" / DIFFUSION_WEIGHTS)
    write_model(folder.with_name("half"), model, "float16")
    half = folder.with_name("half") / "vae" / DIFFUSION_WEIGHTS
    shutil.copy(half, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert_params(read_component(folder, "vae", "fp16")[1], model.params["vae"], "float16")
    with pytest.raises(ValueError, match=r"unet must be a folder with diffusion_pytorch_model\.fp16\.safetensors"):
        read_model(folder, "fp16")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_config_and_weights_that_do_not_belong_together(folder):
    change_json(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"unet must be exactly .*1 mis-shaped") as caught:
        read_model(folder)
    assert "mis-shaped: conv_in.weight [8, 4, 3, 3], expected [8, 9, 3, 3]" in str(caught.value)


def test_missing_and_unused_tensors(folder):
    path = folder / "vae" / DIFFUSION_WEIGHTS
    tensors = {key: np.array(value) for key, value in read_tensors(path).items()}
    tensors["encoder.more.weight"] = tensors.pop("encoder.conv_in.weight")
    write_tensors(path, tensors)
    with pytest.raises(ValueError, match=r"vae must be exactly .*1 missing, 1 unused") as caught:
        read_model(folder)
    assert "missing: encoder.conv_in.weight [8, 3, 3, 3]" in str(caught.value)
    assert "unused: encoder.more.weight" in str(caught.value)


def test_truncated_weights(folder):
    path = folder / "unet" / DIFFUSION_WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="bytes of data"):
        read_model(folder)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_config_is_named(folder, file):
    os.remove(folder / file)
    with pytest.raises(FileNotFoundError, match=file):
        read_model(folder)


def test_a_file_that_pytorch_did_not_write(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must be an intact PyTorch file"):
        read_model(folder)


def test_no_tokenizer(folder):
    os.remove(folder / "tokenizer" / "merges.txt")
    with pytest.raises(ValueError, match=r"tokenizer must be a folder with vocab\.json .* got vocab\.json"):
        read_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_projection": ["diffusers", "Projection"]}, "a further component 'image_projection'"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, r"text_encoder_2 must be .*CLIPTextModelWithProj"),
        ({"unet": ["diffusers", "UNet2DModel"]}, r"unet must be \['diffusers', 'UNet2DConditionModel'\]"),
    ],
)
def test_other_pipelines_are_refused(folder, changes, message):
    change_json(folder / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_model(folder)


def test_folder_without_index(tmp_path):
    with pytest.raises(ValueError, match=r"a diffusers folder with model_index\.json, got none"):
        read_model(tmp_path)


def test_safety_checker_is_not_needed(folder, model):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    change_json(folder / "model_index.json", safety_checker=checker, text_encoder_2=[None, None])
    assert_params(read_model(folder).params, model.params)


def test_parameters_that_do_not_fit_are_not_written(model, tmp_path):
    params = dict(model.params) | {"vae": {"encoder": model.params["vae"]["encoder"]}}
    with pytest.raises(ValueError, match=r"params\['vae'\] must be exactly .* missing"):
        write_model(tmp_path / "m", dataclasses.replace(model, params=params))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_model(model, folder, monkeypatch):
    before = sorted(p.stat().st_mtime_ns for p in folder.rglob("*"))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target, name in ((shutil, "copyfile"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(OSError, match=r"cannot write .*/tiny: No space left"):
                write_model(folder, model)
    assert sorted(p.stat().st_mtime_ns for p in folder.rglob("*")) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_overwriting_keeps_the_readme_and_refuses_other_folders(model, folder, tmp_path):
    (folder / "README.md").write_text("a model card")
    write_model(folder, dataclasses.replace(model, tokenizer=folder / "tokenizer"), "bfloat16")
    assert (folder / "README.md").read_text() == "a model card"
    assert_params(read_model(folder).params, model.params, "bfloat16")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"empty folder or one with model_index\.json"):
        write_model(tmp_path / "home", model)


@pytest.mark.parametrize(("dtype", "value"), [("float32", np.nan), ("float16", np.inf), ("bfloat16", np.nan)])
def test_weights_that_are_not_finite_are_named(folder, dtype, value):
    path = folder / "vae" / DIFFUSION_WEIGHTS
    tensors = {key: np.array(values) for key, values in read_tensors(path).items()}
    tensors["encoder.conv_in.weight"][0, 0, 0, 0] = value
    write_tensors(path, tensors, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"tensor encoder\.conv_in\.weight of .*vae must be finite, got NaN or infinity"
    ):
        read_model(folder)
