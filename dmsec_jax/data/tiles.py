"""Overlapping square tiles that cover a picture of any size, and their blending into one: no tile border shows.

A picture shorter than a tile is extended by its edge pixels. Weights fall linearly towards a tile's borders and sum to 1 at every pixel, so a
blend is a convex combination: what bounds the tiles bounds the picture.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from dmsec_jax.core.checks import require


class Layout(NamedTuple):
    """Tiles of `side` pixels whose upper left corners are at every pair of `tops` and `lefts`, row by row."""

    height: int
    width: int
    side: int
    overlap: int
    """Pixels that neighbours share at least, and over which they are blended."""
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(top, left) of every tile."""
        return [(top, left) for top in self.tops for left in self.lefts]


def layout(height: int, width: int, side: int, overlap: int) -> Layout:
    """As few tiles as cover the picture, spread evenly.

    Raises:
        ValueError: unless sizes are positive and 0 <= overlap < side.
    """
    require(min(height, width, side) >= 1, "size", "at least 1", (height, width, side), "pass a picture")
    require(0 <= overlap < side, "overlap", f"from 0 to {side - 1}", overlap, "take for example a quarter of the side")
    starts = lambda length: _starts(length, side, overlap)
    return Layout(height, width, side, overlap, starts(height), starts(width))


def cut(image: Shaped[np.ndarray, "H W C"], where: Layout) -> Shaped[np.ndarray, "N side side C"]:
    """The tiles of a picture, row by row."""
    height, width = image.shape[:2]
    require((height, width) == where[:2], "image", f"of {where[0]} x {where[1]} pixels", (height, width), "lay it out")
    missing = [max(where.side - length, 0) for length in (height, width)]
    image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    return np.stack([image[top : top + where.side, left : left + where.side] for top, left in where.corners])


def blend(tiles: Float[np.ndarray, "N side side C"], where: Layout) -> Float[np.ndarray, "H W C"]:
    """The picture of which `tiles` are tiles: weighted means where they overlap.

    Tiles that do not agree partly cancel there: of independent signs half the variance is left in the middle of an overlap.
    """
    rows, columns = (
        _shares(length, where, starts) for length, starts in ((where[0], where.tops), (where[1], where.lefts))
    )
    size = [max(length, where.side) for length in where[:2]]
    total = np.zeros((*size, tiles.shape[-1]), np.float32)
    for i, (tile, (top, left)) in enumerate(zip(tiles, where.corners, strict=True)):
        row, column = divmod(i, len(where.lefts))
        weight = rows[row][:, None, None] * columns[column][None, :, None]
        total[top : top + where.side, left : left + where.side] += weight * tile
    return total[: where.height, : where.width]


def _starts(length: int, side: int, overlap: int) -> tuple[int, ...]:
    last = max(length - side, 0)
    count = 1 + -(-last // (side - overlap))
    return tuple(int(start) for start in np.rint(np.linspace(0, last, count)))


def _shares(length: int, where: Layout, starts: tuple[int, ...]) -> np.ndarray:
    """[tiles, side]: what each tile contributes along one axis, a partition of unity."""
    ramp = np.minimum(np.arange(1, where.side + 1), np.arange(where.side, 0, -1))
    taper = np.minimum(ramp, max(where.overlap, 1)).astype(np.float64)
    total = np.zeros(max(length, where.side))
    for start in starts:
        total[start : start + where.side] += taper
    return np.stack([taper / total[start : start + where.side] for start in starts]).astype(np.float32)
