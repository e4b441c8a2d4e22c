"""What a protection did, in figures: to the picture, and to the loss of a model that is shown it."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from dmsec_jax.metrics.extraction import Interval, seed_interval


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
    p_value = float(stats.ttest_1samp(gain, 0, alternative="greater").pvalue) if len(gain) > 1 else np.nan
    return seed_interval(gain, level=level), p_value
