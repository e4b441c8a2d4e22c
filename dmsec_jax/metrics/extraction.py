"""How much of a training set an extracted set gives back: best matches, rates, intervals, hold-outs as the null.

AS  = (1/M) sum_i max_j s(x_i, y_j)             average similarity over the M training pictures x, extracted pictures y
ESR = (1/M) sum_i 1[max_j s(x_i, y_j) >= tau]   share of training pictures that have a match at or above tau
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from dmsec_jax.core.checks import require
from dmsec_jax.metrics.clusters import checked_features


class Matches(NamedTuple):
    index: np.ndarray
    """[M] int: the extracted picture most similar to each training picture; the lowest index among equals."""
    score: np.ndarray
    """[M] float64: its cosine similarity, rounded to 1e-6."""


class Interval(NamedTuple):
    value: float
    low: float
    high: float
    n: int
    """Number of pictures, runs or pairs behind the interval."""


class Summary(NamedTuple):
    """Members, hold-outs and their difference; the rates are keyed by threshold."""

    average: Interval
    rates: dict[float, Interval]
    holdout_average: Interval | None
    holdout_rates: dict[float, Interval] | None
    difference: Interval | None
    """Members' average minus hold-outs' average."""
    rate_differences: dict[float, Interval] | None


def best_matches(pictures, extracted) -> Matches:
    """Nearest extracted picture of each picture.

    Args:
        pictures: [M, D], extracted: [E, D]; finite rows of unit length.

    Raises:
        ValueError: on features that are empty, not finite, not of unit length, or of different widths.
    """
    pictures, extracted = checked_features("pictures", pictures), checked_features("extracted", extracted)
    same = pictures.shape[1] == extracted.shape[1]
    require(
        same,
        "extracted",
        f"[E, {pictures.shape[1]}]",
        f"shape {extracted.shape}",
        "embed both sets with the same network",
    )
    similarity = np.round(pictures @ extracted.T, 6)  # [M, E]
    index = similarity.argmax(axis=1)
    return Matches(index=index, score=similarity[np.arange(len(pictures)), index])


def average_similarity(scores) -> float:
    """AS of per-picture scores [M]."""
    return float(np.mean(checked_scores(scores)))


def success_rate(scores, threshold: float) -> float:
    """ESR of per-picture scores [M] at a threshold."""
    return float(np.mean(checked_scores(scores) >= threshold))


def bootstrap_interval(seed: int, values, *, level: float = 0.95, draws: int = 2000) -> Interval:
    """Percentile interval of the mean of values [M] over resampled pictures, for one run; infinite for one picture."""
    values = checked_scores(values)
    means = _resampled_means(np.random.default_rng(seed), values, draws)
    return _percentiles(float(values.mean()), means, level, len(values), len(values) > 1)


def difference_interval(seed: int, values, null_values, *, level: float = 0.95, draws: int = 2000) -> Interval:
    """Percentile interval of mean(values) - mean(null_values); the two sets are resampled independently."""
    values, null_values = checked_scores(values), checked_scores(null_values)
    rng = np.random.default_rng(seed)
    means = _resampled_means(rng, values, draws) - _resampled_means(rng, null_values, draws)
    known = min(len(values), len(null_values)) > 1
    return _percentiles(float(values.mean() - null_values.mean()), means, level, len(values) + len(null_values), known)


def rate_interval(hits, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of the mean of hits [M], zeros and ones; it has a width where none or all are hits.

    Wilson, Journal of the American Statistical Association 22, 1927. Resampled pictures would be all alike there.

    Raises:
        ValueError: if `hits` is empty or holds anything but zeros and ones.
    """
    hits = checked_scores(hits)
    binary = bool(np.isin(hits, (0, 1)).all())
    require(binary, "hits", "zeros and ones", "other values", "compare the scores with a threshold first")
    low, high = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(level, "wilson")
    return Interval(float(hits.mean()), float(low), float(high), len(hits))


def rate_difference_interval(hits, null_hits, *, level: float = 0.95) -> Interval:
    """Newcombe's hybrid score interval of mean(hits) - mean(null_hits) for two independent sets; raises as `rate_interval`.

    With Wilson's [l, u] for the rate p and [l', u'] for p': from p - p' - sqrt((p - l)^2 + (u' - p')^2)
    to p - p' + sqrt((u - p)^2 + (p' - l')^2). Newcombe, Statistics in Medicine 17, 1998, method 10.
    """
    rate, null = rate_interval(hits, level=level), rate_interval(null_hits, level=level)
    value = rate.value - null.value
    below = np.hypot(rate.value - rate.low, null.high - null.value)
    above = np.hypot(rate.high - rate.value, null.value - null.low)
    return Interval(value, float(value - below), float(value + above), rate.n + null.n)


def seed_interval(values, *, level: float = 0.95) -> Interval:
    """Student-t interval of the mean over independent runs [R], one value per seed; infinite for one run."""
    values = checked_scores(values)
    runs = len(values)
    if runs == 1:
        return Interval(float(values[0]), -np.inf, np.inf, 1)
    half = float(stats.t.ppf((1 + level) / 2, runs - 1) * values.std(ddof=1) / np.sqrt(runs))
    return Interval(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, runs)


def summarise(
    seed: int, members, extracted, thresholds: Sequence[float], *, holdouts=None, level: float = 0.95, draws: int = 2000
) -> Summary:
    """AS and ESR of one run, beside the same numbers for pictures that were never trained on.

    Intervals are over pictures: by bootstrap for AS, `rate_interval` and `rate_difference_interval` for ESR.

    Args:
        members: [M, D] features of the training pictures; extracted: [E, D]; holdouts: [H, D] or None.
        thresholds: for the rates.
        seed, draws: of the bootstrap.
    """
    score = best_matches(members, extracted).score
    interval = lambda values: bootstrap_interval(seed, values, level=level, draws=draws)
    rates = lambda scores: {tau: rate_interval(scores >= tau, level=level) for tau in thresholds}
    if holdouts is None:
        return Summary(interval(score), rates(score), None, None, None, None)
    null = best_matches(holdouts, extracted).score
    return Summary(
        average=interval(score),
        rates=rates(score),
        holdout_average=interval(null),
        holdout_rates=rates(null),
        difference=difference_interval(seed, score, null, level=level, draws=draws),
        rate_differences={tau: rate_difference_interval(score >= tau, null >= tau, level=level) for tau in thresholds},
    )


def checked_scores(values, name: str = "scores") -> np.ndarray:
    """`values` as float64 [M]; raises ValueError unless they are one-dimensional, finite and some."""
    values = np.asarray(values, np.float64)
    require(
        values.ndim == 1 and values.size > 0,
        name,
        "[M], not empty",
        f"shape {values.shape}",
        "give one score per picture",
    )
    finite = np.isfinite(values)
    require(
        bool(finite.all()),
        name,
        "finite",
        f"{(~finite).sum()} of {values.size} not",
        "leave out what is not finite and say so",
    )
    return values


def _resampled_means(rng: np.random.Generator, values: np.ndarray, draws: int) -> np.ndarray:
    return values[rng.integers(0, len(values), (draws, len(values)))].mean(axis=1)


def _percentiles(value: float, means: np.ndarray, level: float, count: int, known: bool) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2]) if known else (-np.inf, np.inf)
    return Interval(value, float(low), float(high), count)
