"""A change of a picture rounded to 8 bit so that the file keeps the budget exactly, in integers."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

from dmsec_jax.core.checks import fail
from dmsec_jax.core.pgd import Budget, Norm


def apply_change(
    pixels: UInt8[np.ndarray, "H W C"],
    change: Float[np.ndarray, "H W C"],
    budget: Budget,
    norm: Norm,
    mask: Bool[np.ndarray, "H W 1"],
) -> UInt8[np.ndarray, "H W C"]:
    """`pixels` plus `change`, rounded to nearest, then brought back into the budget against `pixels`.

    Args:
        change: in levels of 0..255.
        budget: largest change of a sample (linf), or Euclidean norm of the change of the whole picture (l2).
        mask: False where nothing may change.

    Returns:
        Pixels in 0..255. The difference to the original, an integer, is within the budget and zero outside the mask.

    Raises:
        ValueError: if a change is not finite.
    """
    if not np.isfinite(change).all():
        raise fail("change", "finite", "NaN or infinity", "find the step that diverged")
    before = pixels.astype(np.int16)
    radius = float(budget.to("8bit"))
    wanted = np.where(mask, change, 0.0).astype(np.float32)
    if norm == "l2":
        difference = _within_ball(before, wanted, radius)
    else:
        room = int(np.floor(radius + 1e-6))  # a budget of 8 may arrive as 7.9999995
        difference = np.clip(np.rint(wanted), -room, room).astype(np.int16)
    return np.clip(before + difference, 0, 255).astype(np.uint8)


def _within_ball(before: np.ndarray, wanted: np.ndarray, radius: float) -> np.ndarray:
    """Rounded to nearest; where that leaves the ball, the samples that rounding enlarged most are rounded down instead."""
    wanted = np.clip(wanted, -before, 255 - before)
    size = float(np.sqrt(np.square(wanted, dtype=np.float64).sum()))
    wanted *= min(1.0, radius / max(size, 1e-30)) * (1 - 1e-6)  # float32 rounds either way
    difference = np.rint(wanted).astype(np.int16)
    excess = np.square(difference, dtype=np.int64).sum() - radius**2
    if excess <= 0:
        return difference
    flat, magnitude = difference.reshape(-1), np.abs(wanted).reshape(-1)
    raised = np.flatnonzero(np.abs(flat) > magnitude)
    overshoot = np.abs(flat[raised]) - magnitude[raised]
    raised = raised[np.argsort(-overshoot, kind="stable")]
    saved = np.cumsum(2 * np.abs(flat[raised]).astype(np.int64) - 1)  # d^2 - (d - 1)^2
    lowered = raised[: np.searchsorted(saved, excess) + 1]
    flat[lowered] -= np.sign(flat[lowered])
    return difference
