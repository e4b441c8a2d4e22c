import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmsec_jax.core import checks

GOOD = np.zeros((1, 2, 2, 3), np.float32)


def test_fail_builds_the_one_format():
    error = checks.fail("radius", "positive", -1, "use 8 / 255")
    assert isinstance(error, ValueError)
    assert str(error) == "radius must be positive, got -1; use 8 / 255"


def test_require_raises_only_when_broken():
    checks.require(True, "a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"^a must be b, got c; d$"):
        checks.require(False, "a", "b", "c", "d")


@pytest.mark.parametrize("image", [GOOD, jnp.ones((2, 4, 3, 3)), jnp.ones((1, 1, 1, 3), jnp.bfloat16), GOOD[:0]])
def test_image_batch_takes_pictures(image):
    checks.image_batch("image", image)


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GOOD[0], r"image must be \[B, H, W, 3\].*image\[None\]"),
        (GOOD[..., :1], "NHWC"),
        (np.moveaxis(GOOD, -1, 1), "channels last"),
        (GOOD.astype(np.uint8), r"dtype uint8; use image / 127.5 - 1"),
        (GOOD + 255, r"in \[-1, 1\], got \[0, 255\]"),
        (GOOD - 1.5, r"got \[-1.5, 0\]"),
        (GOOD * np.nan, "finite, got NaN"),
        (GOOD + np.inf, "finite"),
    ],
)
def test_image_batch_names_the_fault(image, message, place):
    with pytest.raises(ValueError, match=message):
        checks.image_batch("image", place(image))


def test_image_batch_refuses_what_is_no_array():
    with pytest.raises(ValueError, match="shape None"):
        checks.image_batch("image", [[1.0]])


def test_image_batch_checks_shape_and_dtype_of_tracers_only():
    def traced(image):
        checks.image_batch("image", image)
        return image

    jax.jit(traced)(GOOD + 9)  # values are unknown while tracing
    checks.image_batch("image", jax.ShapeDtypeStruct((1, 2, 2, 3), jnp.float32))
    with pytest.raises(ValueError, match="image"):
        jax.jit(traced)(GOOD[0])
