import json
import zipfile

import numpy as np
import pytest

from benchmarks.readers import _archive, _tensor
from dmsec_jax.checkpoints.io import read_metadata, read_tensors, write_tensors
from dmsec_jax.checkpoints.weights import read_weights, write_weights

TENSORS = {f"layer.{i}.weight": np.full((4, 4), i, np.float32) for i in range(5)}


def same(read):
    return {k: v.tolist() for k, v in read.items()} == {k: v.tolist() for k, v in TENSORS.items()}


@pytest.fixture
def sharded(tmp_path):
    write_weights(tmp_path, "model", TENSORS, shard_bytes=130, metadata={"note": "x"})
    return tmp_path


def test_one_file_with_the_metadata_that_transformers_wants(tmp_path):
    write_weights(tmp_path, "model", TENSORS, dtype="float16")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert read_metadata(tmp_path / "model.safetensors") == {"format": "pt"}
    assert same(read_weights(tmp_path, "model"))


def test_shards_and_index(sharded):
    names = sorted(file.name for file in sharded.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    index = json.loads((sharded / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"]["layer.4.weight"] == names[2]
    assert all((sharded / name).stat().st_size < 130 + 400 for name in names)
    assert read_metadata(sharded / names[0]) == {"format": "pt", "note": "x"}
    assert same(read_weights(sharded, "model"))


def test_one_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    write_weights(tmp_path, "model", TENSORS, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert same(read_weights(tmp_path, "model"))


@pytest.mark.parametrize("shard_bytes", [130, 10**6])
def test_variants(tmp_path, shard_bytes):
    write_weights(tmp_path, "model", TENSORS, dtype="float16", variant="fp16", shard_bytes=shard_bytes)
    assert same(read_weights(tmp_path, "model", "fp16"))
    assert read_weights(tmp_path, "model")["layer.0.weight"].dtype == np.float16  # the only one there
    write_weights(tmp_path, "model", TENSORS, shard_bytes=shard_bytes)
    assert read_weights(tmp_path, "model")["layer.0.weight"].dtype == np.float32
    assert read_weights(tmp_path, "model", "fp16")["layer.0.weight"].dtype == np.float16
    with pytest.raises(ValueError, match=r"model\.ema\.safetensors, got .*model\.fp16.*another variant"):
        read_weights(tmp_path, "model", "ema")


def test_files_of_pytorch_are_read_where_there_are_no_others(tmp_path):
    archive = _archive(_tensor())  # {"a": 0..5 as [2, 3]}
    names = ("pytorch_model.bin", "pytorch_model.fp16.bin")
    for name, variant in zip(names, (None, "fp16"), strict=True):
        (tmp_path / name).write_bytes(archive)
        np.testing.assert_array_equal(read_weights(tmp_path, "model", variant)["a"], np.arange(6).reshape(2, 3))
    (tmp_path / names[0]).rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert list(read_weights(tmp_path, "model")) == ["a"]
    write_weights(tmp_path, "model", TENSORS)
    assert same(read_weights(tmp_path, "model"))


def test_pickles_with_anything_but_tensors_are_refused(tmp_path):
    code = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    with zipfile.ZipFile(tmp_path / "diffusion_pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", code)
    with pytest.raises(ValueError, match=r"made of tensors and containers, got a call of os\.system"):
        read_weights(tmp_path, "diffusion_pytorch_model")


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"a folder with model\.safetensors, got nothing; download"):
            read_weights(folder, "model")


def damage(index, change):
    values = json.loads(index.read_text())
    change(values)
    index.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("weight_map"), "a table of tensor to file name, got None"),
        (lambda v: v["weight_map"].update({"layer.0.weight": 3}), "a table of tensor to file name"),
        (
            lambda v: v["weight_map"].update({"layer.0.weight": "../model.safetensors"}),
            r"\.safetensors files beside it",
        ),
        (lambda v: v["weight_map"].update({"layer.0.weight": "/etc/x.safetensors"}), r"\.safetensors files beside it"),
        (lambda v: v["weight_map"].update({"layer.0.weight": "model.bin"}), r"\.safetensors files beside it"),
        (lambda v: v["weight_map"].update({"layer.0.weight": "gone.safetensors"}), r"gone\.safetensors.*missing shard"),
        (lambda v: v["weight_map"].pop("layer.0.weight"), r"a difference in \['layer\.0\.weight'\]"),
        (lambda v: v["weight_map"].update({"more": v["weight_map"]["layer.4.weight"]}), r"a difference in \['more'\]"),
    ],
)
def test_index_and_shards_must_agree(sharded, change, message):
    damage(sharded / "model.safetensors.index.json", change)
    with pytest.raises(ValueError, match=message):
        read_weights(sharded, "model")


def test_tensor_in_two_shards_is_refused(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    write_tensors(shards[0], dict(read_tensors(shards[0])) | {"layer.4.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"a difference in \['layer\.4\.weight'\]"):
        read_weights(sharded, "model")
