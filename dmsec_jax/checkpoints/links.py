"""Symbolic links that lead out of a model's folder: a folder from a stranger must not make us read, or copy into a model, what else lies here."""

import os
from collections.abc import Iterator
from pathlib import Path

from dmsec_jax.core.checks import require

MAX_ENTRIES = 10**4
"""Of a model's folder; one of Stable Diffusion XL has some thirty."""
SHOWN = 5


def require_inside(folder: str | Path) -> None:
    """Raises ValueError if a link in the folder, or in one below it, leads out of it.

    The folder itself may be a link. In the Hugging Face hub's cache, `<repository>/snapshots/<revision>`, links into `<repository>/blobs` are what a
    model is made of.
    """
    home = Path(os.path.realpath(folder))
    allowed = [home, *(place.parent / "blobs" for place in home.parents if place.name == "snapshots")]
    out = []
    for count, entry in enumerate(_entries(home)):
        require(
            count < MAX_ENTRIES, str(folder), f"a folder of at most {MAX_ENTRIES} entries", "more", "name a model's"
        )
        target = Path(os.path.realpath(entry)) if entry.is_symlink() else home
        if not any(target.is_relative_to(place) for place in allowed):
            out.append(f"{entry.relative_to(home)} -> {os.readlink(entry)[:100]}")
    shown = ", ".join(sorted(out)[:SHOWN]) + (", ..." if len(out) > SHOWN else "")
    cure = "copy what is meant into the folder, if you know where it came from"
    require(not out, f"links in {folder}", "to files inside it", shown, cure)


def _entries(home: Path) -> Iterator[Path]:
    """Every entry at any depth; folders that are links are not entered."""
    for place, folders, files in os.walk(home):
        yield from (Path(place) / name for name in (*folders, *files))
