"""Files from strangers, read with bounds; writes that either complete or change nothing; digests of files and folders.

Of several processes that share a run, process 0 writes: in the others the same calls go to a temporary place and leave nothing.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from dmsec_jax.core.checks import fail, require

MAX_JSON = 16 * 2**20
"""Largest JSON text read, in bytes; the header of Stable Diffusion XL's weights is a fiftieth of it."""
LONGEST = 40
HOST = f"{zlib.crc32(platform.node().encode()):08x}"
"""This machine, in names: of another one's processes nobody here knows whether they live."""
LEFT = re.compile(rf"\.(?P<name>.+)\.{HOST}-(?P<process>[0-9a-f]+)-[0-9a-f]{{8}}\.(?P<kind>part|old)", re.DOTALL)
"""Hidden names that a write under way on this machine has."""
RIGHT_FILE = "check that it is the right file"


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading; symbolic links are followed.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is something else (a pipe would block, a device never end).
        OSError: if it cannot be opened.
    """
    path = Path(path)
    ok = path.is_file() or not path.exists()
    require(ok, str(path), "a regular file", "a folder, pipe or device", RIGHT_FILE)
    return open(path, "rb")


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a file of at most `max_bytes`.

    Raises:
        ValueError: if it is larger.
        FileNotFoundError, ValueError, OSError: as `open_file`.
    """
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    require(len(content) <= max_bytes, str(path), f"at most {max_bytes:,} bytes", "more", RIGHT_FILE)
    return content


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_JSON` bytes.

    Raises:
        ValueError: if it is larger, no JSON or no object.
        FileNotFoundError, ValueError, OSError: as `open_file`.
    """
    content = read_bounded(path, MAX_JSON)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise fail(str(path), "valid JSON in UTF-8", str(error)[:200], "correct it or download it again") from error
    require(isinstance(value, dict), str(path), "one JSON object", type(value).__name__, RIGHT_FILE)
    return value


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file beside `path` that takes its name when the block ends well and vanishes when it does not.

    Folders on the way are made.

    Raises:
        OSError: with the cure, if it cannot be written; an existing file stays as it was.
    """
    if not _writes():
        with tempfile.TemporaryFile() as file:
            yield file
        return
    path = Path(path)
    part = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if explained := _explained(error, path):
            raise explained from error
        raise


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a whole file or nothing; raises like `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_json(path: str | Path, values: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes an object as indented JSON, the whole file or nothing.

    Raises:
        ValueError: on NaN or infinity, which JSON does not have.
        TypeError: on a value that is no JSON.
        OSError: as `atomic_file`.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
    # names of files that are not UTF-8 hold lone surrogates; JSON's escape for one is Python's
    write_atomically(path, (text + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends well and vanishes when it does not.

    An existing folder is replaced only if it holds the file `marker` or nothing; what it holds beyond the new content
    (a README, say) is kept.

    Raises:
        ValueError: if `path` is something else that must not be overwritten.
        OSError: with the cure, if it cannot be written; the existing folder stays as it was.
    """
    if not _writes():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path = Path(path).resolve()
    if path.exists():
        ours = path.is_dir() and ((path / marker).is_file() or not any(path.iterdir()))
        contract = f"a new name, an empty folder or one with {marker}"
        require(ours, str(path), contract, "something else", "choose another name")
    part, old = _beside(path, "part"), _beside(path, "old")
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
        if explained := _explained(error, path):
            raise explained from error
        raise
    if old.exists():
        _join(old, path)


def sha256(path: str | Path) -> str:
    """Hex digest of a file, or of a folder: that of the lines `<digest>  <relative path>` of its files, sorted by path.

    Inside the folder, `find -L . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum` prints it.
    """
    path = Path(path)
    if path.is_dir():
        found = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
        files = sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
        return hashlib.sha256("".join(f"{sha256(path / file)}  {file}\n" for file in files).encode()).hexdigest()
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: str | Path) -> None:
    """Deletes a file, if there is one."""
    if _writes():
        Path(path).unlink(missing_ok=True)


def _writes() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def _beside(path: Path, kind: str) -> Path:
    """A new hidden name in the same folder that tells whose it is, cut so that it is no longer than a name may be."""
    _tidy(path.parent)
    return path.with_name(f".{path.name[:LONGEST]}.{HOST}-{os.getpid():x}-{secrets.token_hex(4)}.{kind}")


@functools.lru_cache(maxsize=1024)
def _tidy(folder: Path) -> None:
    """Clears a folder of what killed processes of this machine left: parts are removed, and a folder that was about to be replaced is put back."""
    with contextlib.suppress(OSError):
        for left in sorted(folder.iterdir()):
            if not (match := LEFT.fullmatch(left.name)) or _alive(int(match["process"], 16)):
                continue
            if match["kind"] == "part":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            elif len(match["name"]) < LONGEST:  # longer names were cut
                target = folder / match["name"]
                _join(left, target) if target.exists() else os.rename(left, target)


def _join(old: Path, path: Path) -> None:
    """Moves what `path` lacks from the folder that it replaced, which is removed."""
    for entry in old.iterdir():
        if not (path / entry.name).exists():
            os.rename(entry, path / entry.name)
    shutil.rmtree(old, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _explained(error: BaseException, path: Path) -> OSError | None:
    """An error of the same kind that names what was to be written and the cure; None if it is none of the system's."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cure = "free some space or choose another folder" if full else "choose another name or folder"
    reason = f"{os.strerror(error.errno)}{f' ({error.filename})' if error.filename else ''}"
    return OSError(error.errno, f"cannot write {path}: {reason}; nothing was changed; {cure}")
