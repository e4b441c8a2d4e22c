"""Assertions on random results, judged by their own standard error instead of a guessed tolerance."""

import numpy as np


def effective_sample_size(draws):
    """How many independent draws [n] would know the mean as well: n / (1 + 2 sum of autocorrelations).

    The sum stops where neighbouring pairs of autocorrelations turn negative (Geyer, Statistical Science 1992,
    section 3.3). A constant sequence counts as one draw.
    """
    draws = np.asarray(draws, np.float64)
    count = len(draws)
    centred = draws - draws.mean()
    if count < 2 or not centred.any():
        return 1.0
    spectrum = np.abs(np.fft.rfft(centred, 2 * count)) ** 2
    correlations = np.fft.irfft(spectrum)[:count]
    correlations = correlations / correlations[0]
    pairs = correlations[: count // 2 * 2].reshape(-1, 2).sum(axis=1)  # pairs[0] = 1 + rho_1
    negative = np.flatnonzero(pairs <= 0)
    pairs = pairs[: negative[0]] if negative.size else pairs
    return float(np.clip(count / max(2 * pairs.sum() - 1, 1 / count), 1, count))


def assert_mean(draws, expected, *, resolution, sigmas=5.0, min_ess=100, independent=True):
    """The mean of `draws` [n, ...] lies within `sigmas` standard errors of `expected` [...], coordinate by coordinate.

    Args:
        draws: n draws along axis 0; for a variance pass squared deviations, for a probability zeros and ones.
        expected: broadcasts to the shape of one draw.
        resolution: the error that this test must be able to see. A standard error so large that `sigmas` of them exceed
            it fails too: such a test could not fail for the right reason.
        min_ess: least number of independent draws that the standard error may rest on.
        independent: False for a chain, whose effective sample size is then estimated per coordinate.
    """
    draws = np.asarray(draws, np.float64)
    assert np.isfinite(draws).all(), "draws hold NaN or infinity"
    flat = draws.reshape(len(draws), -1)
    ess = np.full(flat.shape[1], len(flat)) if independent else np.array([effective_sample_size(x) for x in flat.T])
    assert ess.min() >= min_ess, f"only {ess.min():.0f} effective draws, need {min_ess}: draw more"
    error = flat.std(axis=0, ddof=1) / np.sqrt(ess)
    assert sigmas * error.max() <= resolution, f"{sigmas} x standard error {error.max():.3g} > {resolution}: draw more"
    expected = np.broadcast_to(expected, draws.shape[1:]).reshape(-1)
    off = np.abs(flat.mean(axis=0) - expected)
    worst = int(np.argmax(off - sigmas * error))
    assert (off <= sigmas * error + 1e-12).all(), (
        f"mean {flat[:, worst].mean():.5g} is not {expected[worst]:.5g}: {off[worst] / max(error[worst], 1e-300):.1f} "
        f"standard errors of {error[worst]:.2g} (coordinate {worst})"
    )
