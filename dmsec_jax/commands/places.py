"""Where a verb writes: what it reads must lie elsewhere, and no file may be in the way."""

from collections.abc import Sequence
from pathlib import Path

from dmsec_jax.core.checks import require


def require_apart(written: Sequence[Path], **given: Path | None) -> None:
    """Refuses input in a folder whose files a verb replaces: it would be lost.

    Args:
        written: those folders.
        given: option -> a file or a folder to read; None where it was left out.

    Raises:
        ValueError: naming the option.
    """
    places = [place.resolve() for place in written]
    for option, path in given.items():
        inside = path is not None and any(path.resolve().is_relative_to(place) for place in places)
        require(not inside, option, "outside of what is written", str(path), "choose another --out")


def require_free(out: Path, *names: str) -> None:
    """Refuses an output folder that cannot be one, before anything is computed.

    Args:
        names: of folders in it.

    Raises:
        ValueError: if a file lies where a folder must be.
    """
    for place in (*reversed(out.parents), out, *(out / name for name in names)):
        require(place.is_dir() or not place.exists(), str(place), "a folder", "a file", "choose another --out")
