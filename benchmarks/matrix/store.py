"""Results in files named after a hash of everything that decides them: computed once, whoever asks, and never half written.

The right to compute is a lock on a file, which the system takes back from a process that dies.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def path(folder: Path, kind: str, name: str) -> Path:
    return folder / kind / f"{name}.npz"


def load(file: Path) -> Arrays:
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def kept(file: Path, compute: Callable[[], Arrays]) -> Arrays:
    """What is in the file, else what `compute` gives, which is then in it; where another process is at it, waits for that one."""
    if not file.is_file():
        with claimed(file):
            if not file.is_file():
                save(file, compute())
    return load(file)


@contextlib.contextmanager
def claimed(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the right to compute a file for the length of a block; without `wait`, False where another process holds it."""
    lock = file.parent / "locks" / file.stem
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def save(file: Path, arrays: Arrays) -> None:
    """Writes all or nothing; whoever calls it has claimed the file.

    The name beforehand is always the same, so that a killed process leaves at most one such file, which the next one overwrites.
    """
    part = file.with_name(f".{file.stem}.part")
    with part.open("wb") as handle:
        np.savez(handle, **arrays)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, file)
