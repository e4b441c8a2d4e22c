"""Arrays of unfinished work in files, each bound to all that it was made from, so that the same call goes on and another one does not."""

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dmsec_jax.core import spread
from dmsec_jax.core.files import atomic_file, remove


@dataclasses.dataclass(frozen=True)
class Store:
    """One file.

    Attributes:
        path: ends in .npz.
        origin: what decides the arrays, as JSON values.
    """

    path: Path
    origin: Any

    def read(self) -> dict[str, np.ndarray] | None:
        """What was written for the same origin; None if there is nothing of it, or it cannot be read."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                if str(stored["digest"]) == self._digest:
                    return {name: stored[name] for name in stored.files if name != "digest"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
        return None

    def write(self, **arrays: np.ndarray) -> None:
        """Replaces what is there.

        Raises:
            OSError: as `core.files.atomic_file`.
        """
        with atomic_file(self.path) as file:
            np.savez(file, digest=self._digest, **arrays)

    def remove(self) -> None:
        """Deletes the file, if there is one, once all processes have read it."""
        spread.meet()
        remove(self.path)

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.origin).encode()).hexdigest()
