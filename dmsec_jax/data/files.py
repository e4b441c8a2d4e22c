"""Whole files or none: bounded reading, atomic writing."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from dmsec_jax.core.checks import fail


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """The bytes of a regular file (symbolic links are followed) of at most `max_bytes`.

    Raises:
        ValueError: if it is missing, unreadable, larger, or no regular file (a pipe would block, a device never end).
    """
    path = Path(path)
    if not path.is_file():
        raise fail(
            str(path), "a regular file", "something else" if path.exists() else "nothing there", "correct the path"
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as error:
        raise fail(str(path), "readable", error.strerror, "check its permissions") from error
    if len(content) > max_bytes:
        raise fail(str(path), f"at most {max_bytes:,} bytes", "more", "check that it is the right file")
    return content


def read_json(path: str | Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a UTF-8 file of at most `max_bytes`.

    Raises:
        ValueError: as `read_bounded`, and if the content is not one JSON object.
    """
    content = read_bounded(path, max_bytes)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise fail(str(path), "valid JSON in UTF-8", str(error), "download or write it again") from error
    if not isinstance(value, dict):
        raise fail(str(path), "one JSON object", type(value).__name__, "download or write it again")
    return value


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes under a temporary name in the same folder (made if missing), then renames: all of the file or none.

    Raises:
        OSError: if it cannot be written, for instance because the disk is full; an older file of that name is then
            untouched and nothing new is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror or error} ({len(content):,} bytes to write); nothing was changed"
        raise OSError(error.errno, f"could not write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
