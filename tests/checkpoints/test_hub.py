"""Ids of the hub, resolved from a cache on this machine: no test asks a network."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants

from dmsec_jax.checkpoints import hub

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The snapshot folder of owner/name in an empty cache, and no way out of the machine."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "hub" / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    return repo / "snapshots" / REVISION


def test_what_can_only_be_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    ids = ("owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "owner/name@refs/pr/1")
    assert all(hub.is_id(name) for name in ids)
    others = ("name", "out/model", "a/b/c", "./owner/name", "/owner/name", "owner/../name", "owner/na me", "a/b@")
    assert not any(hub.is_id(name) for name in others)


def test_a_cached_model_is_found_without_a_network(cache, tiny_folder):
    shutil.copytree(tiny_folder, cache)
    assert hub.fetch("owner/name") == hub.fetch(f"owner/name@{REVISION}") == cache


def test_what_is_not_cached_cannot_be_reached(cache):
    with pytest.raises(FileNotFoundError, match=r"neither a file or folder owner/other here, nor a model of that id"):
        hub.fetch("owner/other")


def test_half_precision_is_taken_where_there_is_nothing_else(cache, monkeypatch):
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append(allow_patterns)
        (cache / "unet").mkdir(parents=True, exist_ok=True)
        (cache / "unet" / "config.json").touch()
        name = "unet/diffusion_pytorch_model.fp16.safetensors"
        if name in allow_patterns:
            (cache / name).touch()
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.fetch("owner/name")
    assert len(asked) == 2
    hub.fetch("owner/name", "fp16")
    assert asked[2] == asked[1]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_nothing_but_weights_json_and_texts_is_asked_for(variant):
    suffixes = (".json", ".txt", ".safetensors")
    assert all(pattern.endswith(suffixes) for pattern in hub.patterns(variant))
    texts = [pattern for pattern in hub.patterns(variant) if pattern.endswith(".txt")]
    assert texts == ["tokenizer/merges.txt", "tokenizer_2/merges.txt"]
