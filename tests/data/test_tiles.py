"""Tiles: they cover, they blend back to what they were cut from, and their borders do not show."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dmsec_jax.data import tiles

SIZES = {
    "height": st.integers(1, 70),
    "width": st.integers(1, 70),
    "side": st.integers(1, 24),
    "share": st.floats(0, 0.9),
}


@hypothesis.given(**SIZES)
def test_tiles_of_a_picture_blend_to_the_picture(height, width, side, share):
    where = tiles.layout(height, width, side, int(share * side))
    image = np.random.default_rng(0).normal(size=(height, width, 2)).astype(np.float32)
    cut = tiles.cut(image, where)
    assert cut.shape == (len(where.corners), side, side, 2)
    np.testing.assert_allclose(tiles.blend(cut, where), image, atol=1e-5)


@hypothesis.given(**SIZES)
def test_a_blend_is_bounded_like_its_tiles(height, width, side, share):
    where = tiles.layout(height, width, side, int(share * side))
    signs = np.random.default_rng(1).choice([-1, 1], (len(where.corners), side, side, 1)).astype(np.float32)
    assert np.abs(tiles.blend(signs, where)).max() <= 1 + 1e-6
    starts = np.diff(where.tops)
    assert (starts <= side - where.overlap).all()
    assert (starts > 0).all()


def test_borders_of_tiles_do_not_show():
    where = tiles.layout(100, 100, 40, 20)
    rng = np.random.default_rng(2)
    step = np.zeros(99)
    for _ in range(200):  # each tile a constant of its own: the worst case
        constants = np.broadcast_to(rng.normal(size=(len(where.corners), 1, 1, 1)), (len(where.corners), 40, 40, 1))
        step += np.square(np.diff(tiles.blend(constants.astype(np.float32), where)[..., 0], axis=1)).mean(axis=0) / 200
    unblended = 2.0  # the variance of a difference of two constants
    assert step.max() < unblended / 100


def test_one_tile_where_the_picture_is_no_larger_and_refusals():
    where = tiles.layout(3, 16, 16, 4)
    assert where.corners == [(0, 0)]
    with pytest.raises(ValueError, match="overlap"):
        tiles.layout(3, 16, 16, 16)
    with pytest.raises(ValueError, match="3 x 16"):
        tiles.cut(np.zeros((4, 16, 1)), where)
