"""Where a picture may be changed: what its owner drew, and what is not fully transparent."""

from pathlib import Path

import numpy as np
from PIL import Image

from dmsec_jax.core.checks import fail, require
from dmsec_jax.data import images, originals
from dmsec_jax.data.originals import Original


def shape_of(path: Path, mask: Path | None = None) -> tuple[int, int, int]:
    """The shape of a picture that can be read, with its mask: bad files are named before anything is computed."""
    original = originals.read(path)
    mask_of(mask, path, original)
    return original.pixels.shape


def mask_of(mask: Path | None, path: Path, original: Original) -> np.ndarray | None:
    """[H, W, 1] of where the picture may change; None: everywhere.

    Args:
        mask: a picture, white where it may, or a folder of pictures of the same names; None: wherever it is not fully transparent.
        path: of the picture.

    Raises:
        ValueError: if there is not one mask for it, of its size.
    """
    allowed = None if original.alpha is None else original.alpha > 0
    if mask is None:
        return allowed
    if mask.is_dir():
        found = [one for one in mask.iterdir() if one.stem == path.stem and not images.is_document(one)]
        require(len(found) == 1, str(mask), f"a folder with one mask for {path.name}", f"{len(found)}", "add or remove")
        mask = found[0]
    height, width = original.pixels.shape[:2]
    drawn = Image.fromarray(originals.read(mask).pixels.squeeze()).convert("L")
    if drawn.size != (width, height):
        raise fail(str(mask), f"of {width} x {height} pixels as {path.name}", f"{drawn.size}", "draw it at that size")
    white = np.asarray(drawn)[..., None] >= 128
    return white if allowed is None else white & allowed
