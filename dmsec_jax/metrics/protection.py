"""What a protection did, in figures: to the picture, and to the loss of a model that is shown it."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from dmsec_jax.metrics.extraction import Interval


class Change(NamedTuple):
    """How much a picture was changed; NaN where it is too small for the measure."""

    largest: int
    """Of a sample, in levels."""
    psnr: float
    ssim: float
    lpips: float


def rise(clean, changed, noise, *, level: float = 0.95) -> tuple[Interval, float]:
    """How much more the loss rises than under random noise, relative to the clean loss; pictures are the sample.

    Returns:
        Mean over pictures of (changed - noise) / clean with its t interval, and the p-value of the one-sided paired t-test (NaN for one picture).
    """
    gain = (np.asarray(changed) - np.asarray(noise)) / np.asarray(clean)
    if len(gain) < 2:
        return Interval(float(gain.mean()), -np.inf, np.inf, len(gain)), np.nan
    half = float(stats.t.ppf((1 + level) / 2, len(gain) - 1) * stats.sem(gain))
    mean = float(gain.mean())
    return Interval(mean, mean - half, mean + half, len(gain)), float(
        stats.ttest_1samp(gain, 0, alternative="greater").pvalue
    )
