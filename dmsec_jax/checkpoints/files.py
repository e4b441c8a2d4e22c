"""Writes that either complete or leave nothing behind, bounded JSON, and digests of files and folders."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dmsec_jax.core.checks import fail, require

MAX_JSON = 16 * 2**20
"""Largest JSON text read, in bytes; the header of Stable Diffusion XL's weights is a fiftieth of it."""
RIGHT_FILE = "check that it is the right file"


def open_file(path: str | Path) -> BinaryIO:
    """Opens for reading what is really a file (a pipe or device would block or never end).

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is something else.
    """
    path = Path(path)
    require(path.is_file() or not path.exists(), str(path), "a file", "a folder, pipe or device", RIGHT_FILE)
    return open(path, "rb")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_JSON` bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too long, no JSON or no object.
    """
    with open_file(path) as file:
        text = file.read(MAX_JSON + 1)
    require(len(text) <= MAX_JSON, str(path), f"at most {MAX_JSON} bytes", "more", RIGHT_FILE)
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise fail(str(path), "valid JSON", str(error)[:200], "correct the file or download it again") from error
    require(isinstance(values, dict), str(path), "a JSON object", type(values).__name__, RIGHT_FILE)
    return values


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON with sorted keys, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file beside `path` that takes its name when the block ends well and vanishes when it does not.

    Raises:
        ValueError: if there is no folder to put it in.
        OSError: with the cure, if the disk is full; an existing file stays as it was.
    """
    path = Path(path)
    require(path.parent.is_dir(), str(path), "in an existing folder", "no such folder", "create it first")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if explained := _disk_error(error, path):
            raise explained from error
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends well and vanishes when it does not.

    An existing folder is replaced only if it holds the file `marker` or nothing; what it holds beyond the new content
    (a README, say) is kept.

    Raises:
        ValueError: if `path` is something else that must not be overwritten.
        OSError: with the cure, if the disk is full; the existing folder stays as it was.
    """
    path = Path(path).resolve()
    if path.exists():
        ours = path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))
        contract = f"a new name, an empty folder or one with {marker}"
        require(ours, str(path), contract, "something else", "choose another name")
    part, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(part, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if explained := _disk_error(error, path):
            raise explained from error
        raise
    if old.exists():
        for entry in old.iterdir():
            if not (path / entry.name).exists():
                os.rename(entry, path / entry.name)
        shutil.rmtree(old, ignore_errors=True)


def _disk_error(error: BaseException, path: Path) -> OSError | None:
    """The error to raise instead if the disk takes no more."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return None
    cure = "nothing was left behind; free some space or choose another folder"
    return OSError(error.errno, f"cannot write {path}: {os.strerror(error.errno)}; {cure}")


def sha256(path: str | Path) -> str:
    """Hex digest of a file, or of a folder: that of the lines `<digest>  <relative path>` of its files, sorted by path.

    Inside the folder, `find -L . -type f -printf '%P\\n' | sort | xargs sha256sum | sha256sum` prints it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(f"{sha256(path / file)}  {file}\n" for file in files).encode()).hexdigest()
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
