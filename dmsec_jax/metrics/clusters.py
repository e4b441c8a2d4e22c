"""Groups of near-duplicates in a set of features: thresholds, partitions, ranking, calibration on a reference set.

Features are [N, D] with rows of unit length, similarities are cosines rounded to 1e-6 with a zero diagonal, thresholds
lie on a grid of 0.01: so no comparison depends on the last bit of a matrix product, and every result is the same on
every machine.

Three ways to choose the threshold: `sweep_up` (the first with at least n clusters; the caller ranks and cuts),
`sweep_down` (large cliques from the top), `stable` (n unknown: the threshold whose clusters survive most others).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from sklearn.cluster import AgglomerativeClustering

from dmsec_jax.core.checks import fail, require
from dmsec_jax.metrics import cliques
from dmsec_jax.metrics.cliques import Partition

PartitionFn = Callable[[np.ndarray, float], Partition]
"""(similarity [N, N], threshold) -> partition: `cliques.partition` or `agglomerate`, options bound by `partial`."""


class Cluster(NamedTuple):
    members: tuple[int, ...]
    medoid: int
    """The member whose feature is nearest to the mean feature of the cluster."""
    tightness: float
    """Mean similarity over pairs of members; 0 for a single member."""
    score: float
    """size x tightness, times `confidence`."""
    confidence: float = 1.0
    """Share of the swept thresholds at which the cluster survives; 1 where nothing was swept."""

    @property
    def size(self) -> int:
        return len(self.members)


class Calibration(NamedTuple):
    """One entry per cluster, [K]."""

    base_similarity: np.ndarray
    """Similarity of the medoid to its nearest base sample."""
    own_similarity: np.ndarray
    """Mean similarity of the medoid to the other members; 0 for a single member."""
    rank: np.ndarray
    """(1 + base samples as similar to the medoid as its own members) / (1 + base samples): read it like a p-value."""
    evidence: np.ndarray
    """bool: the members are closer to the medoid than any base sample is."""


def checked_features(name: str, features) -> np.ndarray:
    """`features` as float64 [N, D].

    Raises:
        ValueError: unless they are finite, two-dimensional, not empty, and of unit length.
    """
    features = np.asarray(features, np.float64)
    require(
        features.ndim == 2 and features.size > 0,
        name,
        "[N, D], not empty",
        f"shape {features.shape}",
        "stack one row per picture",
    )
    finite = np.isfinite(features).all(axis=1)
    require(
        bool(finite.all()),
        name,
        "finite",
        f"{(~finite).sum()} rows with NaN or infinity",
        "leave out the pictures flagged as non-finite",
    )
    norms = np.linalg.norm(features, axis=1)
    unit = bool((np.abs(norms - 1) < 1e-3).all())
    require(
        unit,
        name,
        "rows of unit length",
        f"norms from {norms.min():.3g} to {norms.max():.3g}",
        "divide each row by its norm",
    )
    return features


def similarity_matrix(features) -> np.ndarray:
    """Cosines between all pairs, float64 [N, N] rounded to 1e-6, with a zero diagonal."""
    features = checked_features("features", features)
    similarity = np.round(features @ features.T, 6)
    similarity = np.maximum(similarity, similarity.T)
    np.fill_diagonal(similarity, 0.0)
    return similarity


def agglomerate(similarity, threshold: float, *, linkage: Literal["average", "complete"] = "average") -> Partition:
    """Agglomerative clustering down to `threshold`: polynomial in N, where cliques may be exponential.

    With "complete" every pair in a group is at or above the threshold (a clique, perhaps not a maximum one); with
    "average" the mean pair is. Groups come largest first, ties by their first member.
    """
    similarity = np.asarray(similarity, np.float64)
    count = len(similarity)
    if count == 1:
        return Partition(groups=((0,),), threshold=float(threshold), exact=True, nodes=0)
    distance = 1.0 - similarity
    np.fill_diagonal(distance, 0.0)
    just_above = 1.0 - threshold + 1e-9  # scikit-learn merges strictly below its threshold
    model = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage=linkage, distance_threshold=just_above
    )
    labels = model.fit_predict(distance)
    groups = [tuple(int(v) for v in np.flatnonzero(labels == label)) for label in np.unique(labels)]
    groups.sort(key=lambda group: (-len(group), group))
    return Partition(groups=tuple(groups), threshold=float(threshold), exact=True, nodes=0)


def start_threshold(similarity, *, quantile: float = 0.25) -> float:
    """The quantile of all off-diagonal similarities, rounded down to the grid."""
    pairs = np.asarray(similarity)[np.triu_indices(len(similarity), 1)]
    return _grid_floor(np.quantile(pairs, quantile)) if pairs.size else 0.0


def sampled_start_threshold(seed: int, similarity, *, quantile: float = 0.25, entries: int = 1000) -> float:
    """The same quantile of `entries` entries drawn without replacement from the matrix, zero diagonal included."""
    flat = np.asarray(similarity).ravel()
    drawn = np.random.default_rng(seed).permutation(flat.size)[:entries]
    return _grid_floor(np.quantile(flat[drawn], quantile))


def sweep_up(
    similarity, count: int, start: float, *, partition_fn: PartitionFn = cliques.partition, min_size: int = 1
) -> Partition:
    """The partition at the first threshold start, start + 0.01, ... with at least `count` groups of `min_size` or more.

    Where a node budget was hit the partition still counts, with `exact` False. If no threshold gives so many groups (a
    set of near identical pictures), the partition at 1 is returned.
    """
    require(count >= 1, "count", "at least 1", count, "give the number of pictures to look for")
    for threshold in _grid(start, 1.0):
        found = partition_fn(similarity, threshold)
        if sum(len(group) >= min_size for group in found.groups) >= count:
            break
    return found


def sweep_up_skipping(
    similarity, count: int, start: float, *, partition_fn: PartitionFn = cliques.partition
) -> Partition | None:
    """As `sweep_up`, but thresholds whose search hits its budget are passed over; None where none gives enough."""
    for threshold in _grid(start, 1.0):
        found = partition_fn(similarity, threshold)
        if found.exact and len(found.groups) >= count:
            return found
    return None


def sweep_down(
    similarity, count: int, *, min_size: int = 5, floor: float = 0.01, partition_fn: PartitionFn = cliques.partition
) -> Partition:
    """Large groups first: from the top similarity down by 0.01 until `count` groups have at least `min_size` members.

    Only those groups are returned. If no threshold >= `floor` gives so many, the one that gives most of them counts, the
    highest among equals (further down groups merge); perhaps there are none.
    """
    top = _grid_floor(float(np.max(similarity, initial=0.0)))
    best = Partition(groups=(), threshold=top, exact=True, nodes=0)
    for threshold in reversed(_grid(floor, top)) if top >= floor else ():
        found = partition_fn(similarity, threshold)
        found = found._replace(groups=tuple(group for group in found.groups if len(group) >= min_size))
        if len(found.groups) > len(best.groups):
            best = found
        if len(best.groups) >= count:
            break
    return best


def medoid(features, members: Sequence[int]) -> int:
    """The member whose feature is nearest (L2) to the mean of the members' features; ties go to the lowest index."""
    rows = np.asarray(features, np.float64)[list(members)]
    distance = np.round(np.linalg.norm(rows - rows.mean(axis=0), axis=1), 9)
    return int(members[int(np.argmin(distance))])


def rank(
    groups: Iterable[Sequence[int]], similarity, features, *, confidence: Sequence[float] | np.ndarray | None = None
) -> tuple[Cluster, ...]:
    """Clusters by falling score = size x tightness (x confidence); ties go to the lowest first member.

    Args:
        groups: disjoint index sets; similarity: [N, N]; features: [N, D].
        confidence: one number per group, as `stable` gives.
    """
    groups = [tuple(group) for group in groups]
    weights = np.ones(len(groups)) if confidence is None else np.asarray(confidence, np.float64)
    clusters = []
    for group, weight in zip(groups, weights, strict=True):
        pairs = np.asarray(similarity)[np.ix_(group, group)][np.triu_indices(len(group), 1)]
        tightness = float(pairs.mean()) if pairs.size else 0.0
        score = round(len(group) * tightness * float(weight), 6)
        clusters.append(Cluster(group, medoid(features, group), tightness, score, float(weight)))
    return tuple(sorted(clusters, key=lambda cluster: (-cluster.score, cluster.members)))


def stable(
    similarity,
    features,
    *,
    start: float | None = None,
    partition_fn: PartitionFn = cliques.partition,
    min_size: int = 2,
) -> tuple[Cluster, ...]:
    """Clusters of at least `min_size` members where their number is unknown, ranked, each with a confidence.

    Every threshold from `start` (default: `start_threshold`) to the top similarity gives a partition. A cluster
    survives a threshold if that partition has a group with which its Jaccard index is at least 1/2; its confidence is
    the share of thresholds that it survives. The threshold chosen is the one whose scores (size x tightness x
    confidence) have the largest sum, the lowest among equals.
    """
    start = start_threshold(similarity) if start is None else start
    swept = []
    for threshold in _grid(start, _grid_floor(float(np.max(similarity, initial=0.0)))):
        groups = [group for group in partition_fn(similarity, threshold).groups if len(group) >= min_size]
        members = np.zeros((len(groups), len(similarity)))
        for row, group in zip(members, groups, strict=True):
            row[list(group)] = 1
        swept.append((groups, members))
    best, best_score = (), 0.0
    for groups, members in swept:
        confidence = np.mean([_survives(members, others) for _, others in swept], axis=0)  # [K]
        ranked = rank(groups, similarity, features, confidence=confidence)
        score = round(sum(cluster.score for cluster in ranked), 6)
        if score > best_score:
            best, best_score = ranked, score
    return best


def calibrate(clusters: Sequence[Cluster], features, base_features) -> Calibration:
    """Compares clusters with samples of a model that cannot know the pictures: as close, they disprove a cluster.

    Args:
        clusters: as `rank` gives, K of them.
        features: [N, D], the set that was clustered; base_features: [M, D], the base model's samples.
    """
    features, base = checked_features("features", features), checked_features("base_features", base_features)
    columns = []
    for cluster in clusters:
        to_base = np.round(base @ features[cluster.medoid], 6)  # [M]
        others = [member for member in cluster.members if member != cluster.medoid]
        own = float(np.round(features[others] @ features[cluster.medoid], 6).mean()) if others else 0.0
        as_close = int((to_base >= own).sum()) if others else len(base)
        columns.append((float(to_base.max()), own, (1 + as_close) / (1 + len(base)), bool(others) and as_close == 0))
    base_similarity, own_similarity, ranks, evidence = (
        (np.array(column) for column in zip(*columns, strict=True)) if columns else [np.zeros(0)] * 4
    )
    return Calibration(base_similarity, own_similarity, ranks, evidence.astype(bool))


def null_rank(clusters: Sequence[Cluster], base_clusters: Sequence[Cluster]) -> np.ndarray:
    """[K]: (1 + base clusters with at least this score) / (1 + base clusters), both sets clustered in the same way."""
    base_scores = np.array([cluster.score for cluster in base_clusters])
    return np.array([(1 + (base_scores >= cluster.score).sum()) / (1 + base_scores.size) for cluster in clusters])


def _grid(start: float, stop: float) -> list[float]:
    """start, start + 0.01, ..., stop, each the double nearest to its two decimals.

    Raises:
        ValueError: if `start` lies above `stop` or off the range of cosines.
    """
    if not -1.0 <= start <= stop <= 1.0:
        raise fail("threshold", f"from -1 to {stop:.2f}", start, "start lower")
    return [step / 100 for step in range(round(start * 100), round(stop * 100) + 1)]


def _grid_floor(value: float) -> float:
    """`value` rounded down to two decimals; 1e-9 keeps 0.29 (stored as 0.28999...) where it is."""
    return float(np.floor(value * 100 + 1e-9) / 100)


def _survives(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[K] 0/1: has some row of `others` a Jaccard index >= 1/2 with this row of `members`? Both are 0/1 [., N]."""
    if not len(members) or not len(others):
        return np.zeros(len(members))
    common = members @ others.T
    union = members.sum(axis=1)[:, None] + others.sum(axis=1)[None, :] - common
    return (2 * common >= union).any(axis=1).astype(np.float64)
