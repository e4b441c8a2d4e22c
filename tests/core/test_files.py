import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest

from dmsec_jax.core.files import (
    HOST,
    MAX_JSON,
    atomic_file,
    atomic_folder,
    open_file,
    read_bounded,
    read_json,
    sha256,
    write_atomically,
    write_json,
)


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
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OSError, match=r"cannot write .*/a: No space left.*nothing was changed; free some space"
    ) as caught:
        write_atomically(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_fills_up_half_way_changes_nothing(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the kernel then refuses more, as on a full disk
    try:
        with pytest.raises(OSError, match=r"cannot write .*/a: File too large.*free some space"):
            write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_on_the_way_are_made_and_long_names_fit(tmp_path):
    path = tmp_path / "new" / "deep" / ("é" * 127)  # 254 of the 255 bytes that a name may have
    write_atomically(path, b"x")
    assert list(path.parent.iterdir()) == [path]


def test_what_is_in_the_way_is_named(tmp_path):
    write_atomically(tmp_path / "a", b"")
    (tmp_path / "folder").mkdir()
    for name, reason in (("a/b", r"File exists \(.*/a\)"), ("folder", "Is a directory")):
        with pytest.raises(OSError, match=rf"cannot write .*/{name}: {reason}.*choose another name or folder"):
            write_atomically(tmp_path / name, b"x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "folder"]


def test_an_error_of_the_block_keeps_its_kind_and_names_its_file(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"cannot write .*/a: No such file.*absent"),
        atomic_file(tmp_path / "a"),
    ):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ValueError, match="^mine$"), atomic_folder(tmp_path / "b", "index"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match="at most 4 bytes, got more"):
        read_bounded(path, 4)


def test_pipes_devices_and_folders_are_refused_and_links_followed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="a regular file, got a folder, pipe or device"):
            open_file(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="dangling"):
        open_file(tmp_path / "dangling")
    (tmp_path / "a").write_bytes(b"1")
    assert read_bounded(tmp_path / "dangling", 1) == b"1"


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
    values = {"b": [1, None], "a": "é", "\udcff.png": 0}
    write_json(path, values)
    assert read_json(path) == values
    assert list(read_json(path)) == list(values)
    assert '"é"' in path.read_text()
    write_json(path, values, sort_keys=True)
    assert list(read_json(path)) == sorted(values)
    for text, message in [
        (b"[1]", "one JSON object, got list"),
        (b"{", "valid JSON"),
        (b"[" * 100_000, "valid JSON"),
        (b"\xff", "valid JSON in UTF-8"),
        (b" " * (MAX_JSON + 1), "at most 16,777,216 bytes"),
    ]:
        path.write_bytes(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


def test_what_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    for value, error in ((float("nan"), ValueError), (1j, TypeError)):
        with pytest.raises(error, match="JSON"):
            write_json(path, {"a": value})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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


def test_what_killed_writers_left_is_cleared_and_a_folder_half_replaced_comes_back(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, own = f"{HOST}-{dead.pid:x}-00000000", f"{HOST}-{os.getpid():x}-00000000"
    elsewhere = f".c.json.{int(HOST, 16) ^ 1:08x}-{dead.pid:x}-00000000.part"
    (tmp_path / f".model.{gone}.part").mkdir()
    (tmp_path / f".a.json.{gone}.part").write_text("{")
    (tmp_path / f".model.{gone}.old").mkdir()
    (tmp_path / f".model.{gone}.old" / "README").write_text("mine")
    (tmp_path / f".b.json.{own}.part").write_text("of a thread")
    (tmp_path / ".notes.part").write_text("not ours")
    (tmp_path / elsewhere).write_text("of another machine, perhaps alive")
    write_json(tmp_path / "a.json", {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([f".b.json.{own}.part", ".notes.part", elsewhere, "a.json", "model"])
    assert (tmp_path / "model" / "README").read_text() == "mine"
