"""How much a score proves: ROC curves with honest intervals, thresholds that carry over, p-values, sets, many tests at once.

Scores are one number per picture, higher for "was trained on". `scores` [M] are those of the pictures in question (in a benchmark: of the
members), `null` [N] those of pictures known not to have been trained on. All is computed in float64 on the host.

    AUC            P(score > null) + P(score = null) / 2
    p-value        (1 + #{null >= score}) / (1 + N): valid for any N if the picture, were it unused, is exchangeable with the null
    transferred    a threshold set on known non-members alone, then applied to others; the oracle's is chosen on the very scores it judges
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from dmsec_jax.core.checks import require
from dmsec_jax.metrics.extraction import Interval, checked_scores, rate_interval


class Roc(NamedTuple):
    """Rates of the rule `score >= threshold`, from (0, 0) to (1, 1); one point per distinct score, so ties are one step."""

    false_positive: np.ndarray
    true_positive: np.ndarray
    threshold: np.ndarray
    """Falling, from infinity."""


class Rate(NamedTuple):
    """`hits` of `total` members found at a threshold that `false_hits` of `null_total` non-members reach."""

    value: float
    low: float
    high: float
    hits: int
    total: int
    false_hits: int
    null_total: int
    threshold: float


class SetEvidence(NamedTuple):
    """Does a set as a whole score above the null?"""

    difference: float
    """Mean score minus mean null."""
    p_value: float
    exact: bool
    """Whether all permutations were counted, or a random sample of them."""
    permutations: int


def roc(scores, null) -> Roc:
    """The ROC curve."""
    scores, null = checked_scores(scores), checked_scores(null, "null")
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([scores, null]))[::-1]])
    share = lambda values: (len(values) - np.searchsorted(np.sort(values), thresholds, side="left")) / len(values)
    return Roc(share(null), share(scores), thresholds)


def auc(scores, null, *, level: float = 0.95) -> Interval:
    """Area under the ROC curve with DeLong's interval on the logit scale (DeLong et al. 1988; Pepe 2003, Sec. 5.2.3).

    Where the two sets do not overlap, or one holds a single picture, DeLong's variance is zero or unknown: Newcombe's interval stands in.
    """
    scores, null = checked_scores(scores), checked_scores(null, "null")
    area, by_score, by_null = _placements(scores, null)
    if 0 < area < 1 and min(len(scores), len(null)) > 1:
        variance = by_score.var(ddof=1) / len(scores) + by_null.var(ddof=1) / len(null)
        half = stats.norm.ppf((1 + level) / 2) * math.sqrt(variance) / (area * (1 - area))
        low, high = (float(1 / (1 + math.exp(-(math.log(area / (1 - area)) + side * half)))) for side in (-1, 1))
        if variance > 0:
            return Interval(area, low, high, len(scores) + len(null))
    return auc_newcombe(scores, null, level=level)


def auc_newcombe(scores, null, *, level: float = 0.95) -> Interval:
    """AUC with the score-type interval of Newcombe (Statistics in Medicine 2006, part 2, method 5); never of no width.

    It holds all areas theta with |area - theta| <= z sqrt(V(theta)) for

        V = theta (1 - theta) (1 + n* ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (M N),   n* = (M + N) / 2 - 1.
    """
    scores, null = checked_scores(scores), checked_scores(null, "null")
    m, n = len(scores), len(null)
    area = _placements(scores, null)[0]
    z = stats.norm.ppf((1 + level) / 2)
    spread = lambda p: p * (1 - p) * (1 + ((m + n) / 2 - 1) * ((1 - p) / (2 - p) + p / (1 + p))) / (m * n)
    outside = lambda p: (area - p) ** 2 - z**2 * spread(p)
    inside = min(max(area, 1e-12), 1 - 1e-12)  # an area of 0 or 1 is itself a root of `outside`, the wrong one
    low = optimize.brentq(outside, 0.0, inside) if area > 0 else 0.0
    high = optimize.brentq(outside, inside, 1.0) if area < 1 else 1.0
    return Interval(area, float(low), float(high), m + n)


def auc_bootstrap(seed: int, scores, null, *, level: float = 0.95, draws: int = 2000) -> Interval:
    """AUC with the percentile interval over resampled pictures, each set on its own."""
    scores, null = checked_scores(scores), checked_scores(null, "null")
    rng = np.random.default_rng(seed)
    resample = lambda values: values[rng.integers(0, len(values), (draws, len(values)))]
    areas = [_placements(a, b)[0] for a, b in zip(resample(scores), resample(null), strict=True)]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return Interval(_placements(scores, null)[0], float(low), float(high), len(scores) + len(null))


def auc_difference(scores, null, other_scores, other_null, *, level: float = 0.95) -> Interval:
    """AUC of one method minus AUC of another on the same pictures, with DeLong's paired interval.

    Raises:
        ValueError: unless both methods scored the same number of pictures, two or more of each kind.
    """
    first = _placements(checked_scores(scores), checked_scores(null, "null"))
    second = _placements(checked_scores(other_scores, "other_scores"), checked_scores(other_null, "other_null"))
    counts = (len(first[1]), len(first[2])), (len(second[1]), len(second[2]))
    require(counts[0] == counts[1], "other_scores", "of the same pictures", counts, "score both methods on one set")
    require(min(counts[0]) > 1, "scores", "of two or more pictures of each kind", counts[0], "add pictures")
    gaps = [a - b for a, b in zip(first[1:], second[1:], strict=True)]
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps))
    difference = first[0] - second[0]
    return Interval(difference, difference - half, difference + half, sum(counts[0]))


def rate_at(scores, null, false_positive_rate: float, *, level: float = 0.95) -> Rate:
    """True positives at the largest threshold-rule whose false positives are at most that share of the null.

    The counts come with it: with fewer than 1 / rate non-members the rule admits none of them, and the rate is only nominal. The interval
    (Wilson) is over the members at that threshold.
    """
    scores, null = checked_scores(scores), checked_scores(null, "null")
    possible = 0 <= false_positive_rate <= 1
    require(possible, "false_positive_rate", "a share in [0, 1]", false_positive_rate, "for example 0.01")
    curve = roc(scores, null)
    chosen = int(np.flatnonzero(curve.false_positive <= false_positive_rate + 1e-12)[-1])
    threshold = float(curve.threshold[chosen])
    hits, false_hits = scores >= threshold, int((null >= threshold).sum())
    value, low, high, total = rate_interval(hits, level=level)
    return Rate(value, low, high, int(hits.sum()), total, false_hits, len(null), threshold)


def p_values(scores, null) -> np.ndarray:
    """[M] conformal p-values: (1 + non-members that score as high or higher) / (1 + non-members)."""
    scores, null = checked_scores(scores), np.sort(checked_scores(null, "null"))
    return (1 + len(null) - np.searchsorted(null, scores, side="left")) / (1 + len(null))


def transferred_threshold(null, level: float) -> float:
    """The score that an unused picture exceeds with probability at most `level`; infinite where too few non-members are known to say.

    `score > threshold` is the same decision as `p_values(score) <= level`.
    """
    null = np.sort(checked_scores(null, "null"))
    require(0 < level < 1, "level", "a probability in (0, 1)", level, "for example 0.05")
    allowed = math.floor(level * (len(null) + 1) + 1e-9) - 1  # non-members that may score as high
    return float(null[len(null) - 1 - allowed]) if allowed >= 0 else math.inf


def transferred_accuracy(scores, null, calibration, *, level: float = 0.05) -> float:
    """Balanced accuracy, (TPR + TNR) / 2, of the threshold that `calibration` scores of other non-members set."""
    threshold = transferred_threshold(calibration, level)
    scores, null = checked_scores(scores), checked_scores(null, "null")
    return float(((scores > threshold).mean() + (null <= threshold).mean()) / 2)


def oracle_accuracy(scores, null) -> float:
    """Best balanced accuracy over all thresholds, chosen on these very scores, as papers report it.

    It is biased upwards: pure noise gives 0.71 on 2 + 2 pictures, 0.62 on 10 + 10, 0.53 on 200 + 200.
    """
    curve = roc(scores, null)
    return float(np.max(curve.true_positive + 1 - curve.false_positive) / 2)


def paired_scores(similarity) -> np.ndarray:
    """[M] of a matrix [M, M]: each picture against its own recovery."""
    return np.diagonal(_square(similarity)).copy()


def best_of_split(similarity) -> np.ndarray:
    """[M] of a matrix [M, M] (pictures x recoveries): each picture against the best recovery of ANY picture of its split.

    As public code scores; a picture can win by another's recovery, so look at `paired_scores` too.
    """
    return _square(similarity).max(axis=1)


def set_evidence(seed: int, scores, null, *, draws: int = 10_000) -> SetEvidence:
    """Permutation test, one-sided: does this set score higher than the null by more than relabelling explains?

    Exact where there are at most `draws` relabellings. The p-value is never below 1 / (number of relabellings), and valid at any size if
    unused pictures of the set are exchangeable with the null: of the same artist or subject, prepared in the same way.
    """
    scores, null = checked_scores(scores), checked_scores(null, "null")
    if min(len(scores), len(null)) == 1:  # then the test is one of ranks
        single, others = (scores[0], null) if len(scores) == 1 else (-null[0], -scores)
        p_value = float((1 + (others >= single).sum()) / (1 + len(others)))
        return SetEvidence(float(scores.mean() - null.mean()), p_value, True, 1 + len(others))
    result = stats.permutation_test(
        (scores, null),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        vectorized=True,
        alternative="greater",
        n_resamples=draws,
        rng=np.random.default_rng(seed),
    )
    possible = math.comb(len(scores) + len(null), len(scores))
    exact = possible <= draws
    return SetEvidence(float(result.statistic), float(result.pvalue), exact, possible if exact else draws)


def holm(p) -> np.ndarray:
    """[M] p-values adjusted so that at `p <= a` the chance of any false claim is at most `a` (Holm 1979)."""
    p = _probabilities(p)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p) -> np.ndarray:
    """[M] p-values adjusted so that of the claims at `p <= a` an expected share of at most `a` is false.

    It holds for conformal p-values that share their non-members (Bates et al. 2023, Theorem 2).
    """
    return stats.false_discovery_control(_probabilities(p), method="bh")


def _placements(scores: np.ndarray, null: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC; [M] share of the null below each score; [N] share of the scores above each null. Ties count half."""
    share_below = lambda values, others: (
        (np.searchsorted(others, values, side="left") + np.searchsorted(others, values, side="right"))
        / (2 * len(others))
    )
    by_score = share_below(scores, np.sort(null))
    return float(by_score.mean()), by_score, 1 - share_below(null, np.sort(scores))


def _square(similarity) -> np.ndarray:
    similarity = np.asarray(similarity, np.float64)
    shaped = similarity.ndim == 2 and similarity.shape[0] == similarity.shape[1] > 0
    require(shaped, "similarity", "[M, M], pictures x recoveries", f"shape {similarity.shape}", "recover every picture")
    return similarity


def _probabilities(p) -> np.ndarray:
    p = checked_scores(p, "p")
    require(bool(((p >= 0) & (p <= 1)).all()), "p", "in [0, 1]", f"[{p.min():.3g}, {p.max():.3g}]", "pass p-values")
    return p
