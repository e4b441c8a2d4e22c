import errno
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest

from dmsec_jax.checkpoints.files import MAX_JSON, atomic_file, atomic_folder, read_json, sha256, write_json
from dmsec_jax.checkpoints.io import write_tensors


def interrupted(file):
    file.write(b"half")
    raise KeyboardInterrupt


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_atomic_file_replaces_only_when_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        interrupted(file)
    assert path.read_text() == "old"
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: No space left.*free some space") as caught:
        write_tensors(path, {"a": np.ones(3)})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_fills_up_half_way_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*free some space"):
            write_tensors(tmp_path / "x", {"a": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="existing folder"), atomic_file(tmp_path / "none" / "a"):
        pass


def test_atomic_folder_replaces_models_and_keeps_what_is_no_part_of_them(tmp_path):
    place = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with atomic_folder(place, "index") as part:
            assert not (place / "index").exists() or (place / "index").read_text() == "one"
            (part / "index").write_text(text)
            (part / "unet").mkdir()
            (part / "unet" / text).touch()
        (place / "README").write_text("mine")
    assert (place / "index").read_text() == "two"
    assert [file.name for file in (place / "unet").iterdir()] == ["two"]
    assert (place / "README").read_text() == "mine"
    assert list(place.parent.iterdir()) == [place]


def test_atomic_folder_refuses_what_is_no_model(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    (tmp_path / "file").touch()
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="empty folder or one with index"), atomic_folder(tmp_path / name, "index"):
            pytest.fail("entered")
    assert (tmp_path / "thesis" / "chapter1").exists()


@pytest.mark.parametrize("fail_at", ["body", "rename"])
def test_atomic_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch, fail_at):
    place = tmp_path / "model"
    place.mkdir()
    (place / "index").write_text("old")
    rename, calls = os.rename, []

    def second_rename_fails(source, target):
        calls.append(source)
        return full_disk() if len(calls) == 2 else rename(source, target)

    if fail_at == "rename":
        monkeypatch.setattr(os, "rename", second_rename_fails)
    with pytest.raises(OSError, match="free some space"), atomic_folder(place, "index") as part:
        shutil.copy(__file__, part / "index") if fail_at == "rename" else full_disk()
    assert (place / "index").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "a": "é"})
    assert read_json(path) == {"b": [1, None], "a": "é"}
    for text, message in [
        (b"[1]", "a JSON object, got list"),
        (b"{", "valid JSON"),
        (b"[" * 100_000, "valid JSON"),
        (b"\xff", "valid JSON"),
        (b" " * (MAX_JSON + 1), "at most 16777216 bytes"),
    ]:
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_sha256_of_file_and_folder(tmp_path):
    assert sha256_of(tmp_path, b"abc").startswith("ba7816bf8f01cfea414140de5dae2223")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"1")
    (tmp_path / "a.").write_bytes(b"2")
    command = "find -L . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    shell = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True).stdout.split()[0]
    before = sha256(tmp_path)
    assert before == shell
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert sha256(tmp_path) != before


def sha256_of(folder, content):
    (folder / "a").write_bytes(content)
    return sha256(folder / "a")
