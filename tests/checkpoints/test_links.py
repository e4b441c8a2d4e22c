"""What is refused in a folder from a stranger, and what the hub's cache and tidy users may do."""

import os
import shutil

import pytest

from dmsec_jax.checkpoints import adapters, diffusers, single_file
from dmsec_jax.checkpoints.inspection import inspect
from dmsec_jax.checkpoints.links import require_inside

LEADS_OUT = r"links in .+ must be to files inside it, got "


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret.json"
    file.write_text('{"key": "hunter2"}')
    return file


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


READERS = {"model": diffusers.read_model, "configs": diffusers.read_preset, "info": inspect}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", ["tokenizer/added_tokens.json", "unet/config.json", "scheduler"])
def test_a_link_out_of_a_model_is_refused(folder, secret, reader, place):
    """Such a tokenizer's file would be copied into what is fine-tuned from the model."""
    path = folder / place
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(secret.parent if place == "scheduler" else secret)
    with pytest.raises(ValueError, match=LEADS_OUT + f"{place} -> ") as caught:
        READERS[reader](folder)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("target", ["/dev/zero", "../../../../../../etc/passwd", "../../nothing", "/proc/self/environ"])
def test_wherever_it_leads(folder, target):
    (folder / "vae" / "config.json").unlink()
    (folder / "vae" / "config.json").symlink_to(target)
    with pytest.raises(ValueError, match=LEADS_OUT):
        diffusers.read_model(folder)


def test_a_link_in_an_adapters_folder_and_in_a_tokenizers(tmp_path, secret):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "lora" / "adapter_config.json").symlink_to(secret)
    with pytest.raises(ValueError, match=LEADS_OUT + r"adapter_config\.json -> "):
        adapters.find_file(tmp_path / "lora")
    with pytest.raises(ValueError, match=LEADS_OUT):
        single_file.require_known(tmp_path / "x.ckpt", "epsilon", tmp_path / "lora")


def test_links_inside_and_a_linked_folder_are_fine(folder, tmp_path):
    (folder / "unet" / "config.json").rename(folder / "config.json")
    (folder / "unet" / "config.json").symlink_to("../config.json")
    (tmp_path / "name").symlink_to(folder)
    assert diffusers.read_preset(tmp_path / "name") == diffusers.read_preset(folder)


def test_the_hubs_cache_is_made_of_links(tiny_folder, tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = shutil.copytree(tiny_folder, repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    for i, file in enumerate([file for file in snapshot.rglob("*") if file.is_file()]):
        file.rename(repository / "blobs" / str(i))
        file.symlink_to(os.path.relpath(repository / "blobs" / str(i), file.parent))
    assert diffusers.read_preset(snapshot) == diffusers.read_preset(tiny_folder)
    require_inside(snapshot / "tokenizer")
    (snapshot / "notes").symlink_to(repository)
    with pytest.raises(ValueError, match=LEADS_OUT + "notes -> "):
        diffusers.read_preset(snapshot)


def test_many_and_endless_links(folder):
    for i in range(20):
        (folder / f"link{i}").symlink_to(f"link{(i + 1) % 20}")
    require_inside(folder)  # they lead nowhere, but not out
    for i in range(20):
        (folder / f"out{i}").symlink_to("/")
    with pytest.raises(ValueError, match="out0 -> /, out1 -> /, out10 -> /, out11 -> /, out12 -> /, "):
        require_inside(folder)
