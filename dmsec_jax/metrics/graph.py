"""How near an estimated graph, its edge probabilities and its fit are to the truth; in NumPy on the host.

Graphs are marks [V, V] (`core.marks`), of any kind as long as both are of the same: compare partial ancestral graphs with partial ancestral
graphs. An end is an ordered pair: (i, j) is the mark at j on the edge between i and j, so that an arrowhead counts only if it stands at the
same vertex of the same edge.

    skeleton     pairs that are adjacent                     arrowhead, tail   ends with that mark
    endpoint     ends, right if the marks are equal          edge              pairs, right if both marks are
    distance     ends whose marks differ, none included: an edge too many or too few costs 2, a reversal 2, one wrong mark 1
"""

from typing import NamedTuple

import numpy as np
from sklearn import metrics

from dmsec_jax.core.checks import require
from dmsec_jax.core.marks import ARROW, NONE, TAIL


class Scores(NamedTuple):
    """`hits` of `found` are right; `true` were to be found. Without any to be found or any found, nothing was missed or invented: 1."""

    precision: float
    recall: float
    f1: float
    hits: int
    found: int
    true: int


class Reliability(NamedTuple):
    """Edge probabilities in bins of equal width; bins without any pair are left out."""

    mean_probability: np.ndarray
    frequency: np.ndarray
    """Share of the bin's pairs that are adjacent."""
    count: np.ndarray


def skeleton_scores(found, true) -> Scores:
    """Of adjacent pairs."""
    found, true = _pair_of_marks(found, true)
    upper = np.triu_indices(len(true), 1)
    return _scores(found[upper] != NONE, true[upper] != NONE)


def arrowhead_scores(found, true) -> Scores:
    """Of arrowheads: (i, j) where some i *-> j."""
    found, true = _pair_of_marks(found, true)
    return _scores(found == ARROW, true == ARROW)


def tail_scores(found, true) -> Scores:
    """Of tails: (i, j) where j causes i."""
    found, true = _pair_of_marks(found, true)
    return _scores(found == TAIL, true == TAIL)


def endpoint_scores(found, true) -> Scores:
    """Of all ends, circles included; right where the marks are equal."""
    found, true = _pair_of_marks(found, true)
    return _matches((found == true) & (true != NONE), found != NONE, true != NONE)


def edge_scores(found, true) -> Scores:
    """Of edges; right where both marks are equal."""
    found, true = _pair_of_marks(found, true)
    upper = np.triu_indices(len(true), 1)
    right = (found == true) & (found.T == true.T) & (true != NONE)
    return _matches(right[upper], found[upper] != NONE, true[upper] != NONE)


def bidirected_scores(found, true) -> Scores:
    """Of i <-> j."""
    found, true = _pair_of_marks(found, true)
    upper = np.triu_indices(len(true), 1)
    both = lambda marks: ((marks == ARROW) & (marks.T == ARROW))[upper]
    return _scores(both(found), both(true))


def distance(found, true) -> int:
    """Structural Hamming distance by ends."""
    found, true = _pair_of_marks(found, true)
    return int((found != true).sum())


def pairs(matrix) -> np.ndarray:
    """[..., V (V - 1) / 2]: the entries above the diagonal of symmetric [..., V, V], row by row."""
    matrix = np.asarray(matrix)
    first, second = np.triu_indices(matrix.shape[-1], 1)
    return matrix[..., first, second]


def auroc(probabilities, adjacent) -> float:
    """Area under the ROC curve over all pairs given (any shape)."""
    return float(metrics.roc_auc_score(*_both_kinds(probabilities, adjacent)))


def auprc(probabilities, adjacent) -> float:
    """Average precision, the step-wise area under the precision-recall curve."""
    return float(metrics.average_precision_score(*_both_kinds(probabilities, adjacent)))


def log_loss(probabilities, adjacent) -> float:
    """Mean of -log q(adjacent or not), in nats per pair; infinite where a certainty was wrong."""
    p, y = _probabilities(probabilities, adjacent)
    with np.errstate(divide="ignore"):
        return float(-np.log(np.where(y, p, 1 - p)).mean())


def reliability(probabilities, adjacent, bins: int = 10) -> Reliability:
    """What share of the pairs that are given a probability of about p are adjacent."""
    p, y = _probabilities(probabilities, adjacent)
    place = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    mean = lambda values: np.bincount(place, values, minlength=bins)[used] / count[used]
    return Reliability(mean(p), mean(y.astype(float)), count[used])


def expected_calibration_error(probabilities, adjacent, bins: int = 10) -> float:
    """Mean over pairs of |frequency - probability| of their bin (Naeini, Cooper, Hauskrecht, AAAI 2015)."""
    table = reliability(probabilities, adjacent, bins)
    return float(np.average(np.abs(table.frequency - table.mean_probability), weights=table.count))


def sum_ratio(probabilities, adjacent) -> float:
    """Expected over true number of edges: 1 if calibrated in the large."""
    p, y = _probabilities(probabilities, adjacent)
    require(bool(y.any()), "adjacent", "with at least one edge", "none", "pool more graphs")
    return float(p.sum() / y.sum())


def gaussian_log_likelihood(covariance, data) -> float:
    """Mean log-density of rows [N, V] of zero mean under N(0, covariance), in nats; on rows held out, how well a fit predicts."""
    data = np.asarray(data, np.float64)
    return -_deviance(np.asarray(covariance, np.float64), data.T @ data / len(data)) / 2


def bic(covariance, sample_covariance, num_rows: int, num_edges: int) -> float:
    """-2 log-likelihood + log(N) x (edges + V) of a fitted covariance; lower is better. The variances count as V parameters."""
    sample = np.asarray(sample_covariance, np.float64)
    fit = num_rows * _deviance(np.asarray(covariance, np.float64), sample)
    return float(fit + np.log(num_rows) * (num_edges + len(sample)))


def _deviance(covariance, sample) -> float:
    """V log 2 pi + log det Sigma + tr(Sigma^-1 S)."""
    sign, log_det = np.linalg.slogdet(covariance)
    require(bool(sign > 0), "covariance", "positive definite", f"sign {sign:g} of the determinant", "refit the graph")
    return float(len(sample) * np.log(2 * np.pi) + log_det + np.trace(np.linalg.solve(covariance, sample)))


def _scores(found, true) -> Scores:
    return _matches(found & true, found, true)


def _matches(right, found, true) -> Scores:
    hits, found, true = int(right.sum()), int(found.sum()), int(true.sum())
    share = lambda part, whole: part / whole if whole else 1.0
    return Scores(share(hits, found), share(hits, true), share(2 * hits, found + true), hits, found, true)


def _pair_of_marks(found, true) -> tuple[np.ndarray, np.ndarray]:
    found, true = np.asarray(found), np.asarray(true)
    square = true.ndim == 2 and true.shape[0] == true.shape[1] and found.shape == true.shape
    require(square, "marks", "two of one shape [V, V]", f"{found.shape} and {true.shape}", "order the variables alike")
    return found, true


def _probabilities(probabilities, adjacent) -> tuple[np.ndarray, np.ndarray]:
    p, y = np.asarray(probabilities, np.float64).ravel(), np.asarray(adjacent).ravel() != 0
    require(p.shape == y.shape, "probabilities", "one per pair", f"{p.size} for {y.size}", "pass `pairs` of both")
    proper = bool(((p >= 0) & (p <= 1)).all())
    require(
        proper, "probabilities", "in [0, 1]", f"[{p.min(initial=0):.3g}, {p.max(initial=0):.3g}]", "apply a sigmoid"
    )
    return p, y


def _both_kinds(probabilities, adjacent) -> tuple[np.ndarray, np.ndarray]:
    p, y = _probabilities(probabilities, adjacent)
    require(bool(0 < y.sum() < y.size), "adjacent", "of both kinds", f"{y.sum()} of {y.size}", "pool more graphs")
    return y, p
