"""One format for every error at the Python boundary: what was expected, what came, what to do."""

import jax
import numpy as np


def fail(name: str, contract: str, got: object, cure: str) -> ValueError:
    """Builds (does not raise) the error `"<name> must be <contract>, got <got>; <cure>"`."""
    return ValueError(f"{name} must be {contract}, got {got}; {cure}")


def require(ok: bool, name: str, contract: str, got: object, cure: str) -> None:
    """Raises `fail(...)` unless `ok`. For contracts on the caller; our own invariants use `assert`."""
    if not ok:
        raise fail(name, contract, got, cure)


def image_batch(name: str, image) -> None:
    """Requires `image` to be [B, H, W, 3] floating point; values are checked where they are concrete.

    Raises:
        ValueError: on another rank, channel count or dtype, and on NaN or values outside [-1, 1] of concrete arrays.
    """
    shape = getattr(image, "shape", None)
    rank_4 = shape is not None and len(shape) == 4
    require(rank_4, name, "[B, H, W, 3] in [-1, 1]", f"shape {shape}", "add the batch axis with image[None]")
    require(shape[-1] == 3, name, "[B, H, W, 3] (NHWC)", f"shape {shape}", "move channels last and convert to RGB")
    is_float = jax.dtypes.issubdtype(image.dtype, np.floating)
    require(is_float, name, "float in [-1, 1]", f"dtype {image.dtype}", "use image / 127.5 - 1")
    if _is_concrete(image):
        values = np.asarray(image, np.float32)
        require(bool(np.isfinite(values).all()), name, "finite", "NaN or infinity", "check the file it came from")
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        in_range = low >= -1.001 and high <= 1.001
        require(in_range, name, "in [-1, 1]", f"[{low:.3g}, {high:.3g}]", "use image / 127.5 - 1")


def _is_concrete(array) -> bool:
    """Whether the values can be looked at here: not a tracer, a shape, or an array partly on other hosts."""
    if isinstance(array, jax.core.Tracer):
        return False
    return isinstance(array, np.ndarray) or (isinstance(array, jax.Array) and array.is_fully_addressable)
