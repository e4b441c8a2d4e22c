import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsec_jax.metrics import cliques, clusters


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def planted(sizes, *, noise=0.4, strays=0, width=64, seed=0):
    """Groups of noisy copies of random directions, and strays, shuffled: (features, labels with -1 for strays)."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(len(sizes), width)))
    rows = np.repeat(centres, sizes, axis=0)
    rows = rows + noise * rng.normal(size=rows.shape) / np.sqrt(width)
    rows = np.concatenate([rows, rng.normal(size=(strays, width))])
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), -np.ones(strays, int)])
    order = rng.permutation(len(rows))
    return unit(rows[order]), labels[order]


def as_sets(groups):
    return {frozenset(int(v) for v in group) for group in groups}


def truth(labels):
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels[labels >= 0].tolist())}


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 9))
    edges = draw(st.lists(st.booleans(), min_size=count * count, max_size=count * count))
    upper = np.triu(np.array(edges, bool).reshape(count, count), 1)
    return upper | upper.T


@given(graphs())
def test_maximum_clique_has_the_size_that_brute_force_finds(graph):
    found = cliques.maximum_clique(graph)
    members = list(found.members)
    assert all(graph[a, b] for a, b in itertools.combinations(members, 2))
    larger = itertools.combinations(range(len(graph)), len(members) + 1)
    assert not any(all(graph[a, b] for a, b in itertools.combinations(group, 2)) for group in larger)
    assert found.exact


def dense_graph(count=60, share=0.85, seed=1):
    upper = np.triu(np.random.default_rng(seed).random((count, count)) < share, 1)
    return upper | upper.T


def test_budget_bounds_the_search_and_still_gives_a_maximal_clique():
    graph = dense_graph()
    full = cliques.maximum_clique(graph, node_budget=10**6)
    cut = cliques.maximum_clique(graph, node_budget=1)
    assert full.exact
    assert not cut.exact
    assert cut.nodes <= len(cut.members) + 1 < full.nodes
    assert len(cut.members) <= len(full.members)
    others = np.setdiff1d(np.arange(len(graph)), cut.members)
    assert not graph[np.ix_(others, cut.members)].all(axis=1).any()


def test_partition_shares_one_budget():
    similarity = dense_graph().astype(float)
    found = cliques.partition(similarity, 0.5, node_budget=50)
    assert not found.exact
    assert found.nodes < 50 + 2 * len(similarity)
    assert sorted(v for group in found.groups for v in group) == list(range(len(similarity)))


def test_equal_cliques_are_taken_by_index():
    similarity = np.kron(np.eye(3), np.ones((3, 3)))
    assert cliques.partition(similarity, 0.5).groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8))


def test_partition_does_not_depend_on_the_last_bits_of_the_features():
    features, _ = planted([6, 6, 6], strays=20)
    shaken = features * (1 + 1e-13 * np.random.default_rng(3).normal(size=features.shape))
    one, other = clusters.similarity_matrix(features), clusters.similarity_matrix(shaken)
    assert (one == other).all()
    assert cliques.partition(one, 0.2).groups == cliques.partition(other, 0.2).groups


def test_one_sided_graph_is_refused():
    with pytest.raises(ValueError, match=r"adjacency must be symmetric, .*; symmetrise"):
        cliques.maximum_clique(np.triu(np.ones((3, 3), bool)))


@pytest.mark.parametrize("partition_fn", [cliques.partition, clusters.agglomerate], ids=["cliques", "agglomerate"])
def test_planted_groups_are_recovered(partition_fn):
    features, labels = planted([7, 6, 5, 4])
    found = partition_fn(clusters.similarity_matrix(features), 0.5)
    assert as_sets(found.groups) == truth(labels)


def test_complete_linkage_gives_cliques():
    features, _ = planted([6, 6], noise=0.9, strays=10)
    similarity = clusters.similarity_matrix(features)
    np.fill_diagonal(similarity, 1)
    for group in clusters.agglomerate(similarity, 0.3, linkage="complete").groups:
        assert similarity[np.ix_(group, group)].min() >= 0.3 - 1e-9


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.full((2, 3), np.nan), r"features must be finite, got 2 rows with NaN"),
        (np.ones((2, 3)), r"features must be rows of unit length, got norms from 1\.73"),
        (np.zeros((0, 3)), r"features must be \[N, D\], not empty"),
    ],
)
def test_bad_features_are_named(features, message):
    with pytest.raises(ValueError, match=message):
        clusters.similarity_matrix(features)


def test_start_threshold_is_the_quantile_of_pairs_on_the_grid():
    similarity = np.array([[0, 0.111, 0.222], [0.111, 0, 0.335], [0.222, 0.335, 0]])
    assert clusters.start_threshold(similarity, quantile=0.5) == 0.22
    assert clusters.start_threshold(np.full((2, 2), 0.29), quantile=0.5) == 0.29


def test_sampled_start_counts_the_zero_diagonal():
    similarity = 0.5 * (1 - np.eye(4))  # a quarter of the 16 entries are the diagonal's zeros
    assert clusters.start_threshold(similarity, quantile=0.2) == 0.5
    assert clusters.sampled_start_threshold(0, similarity, quantile=0.2) == 0.0


def test_sweep_up_stops_at_the_first_threshold_with_enough_groups():
    similarity = np.full((9, 9), 0.5)
    similarity[:3, :3] = similarity[3:6, 3:6] = similarity[6:, 6:] = 0.9
    np.fill_diagonal(similarity, 0)
    found = clusters.sweep_up(similarity, 3, 0.4)
    assert found.threshold == 0.51
    assert found.groups == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert clusters.sweep_up(similarity, 1, 0.4).threshold == 0.4
    assert clusters.sweep_up(similarity, 4, 0.4).threshold == 0.91


def test_sweep_up_counts_groups_of_the_least_size():
    similarity = np.full((5, 5), 0.5)
    similarity[:2, :2] = similarity[2:4, 2:4] = 0.9
    np.fill_diagonal(similarity, 0)
    similarity[4] = similarity[:, 4] = 0.1  # a stray
    assert clusters.sweep_up(similarity, 2, 0.4).groups == ((0, 1, 2, 3), (4,))
    assert clusters.sweep_up(similarity, 2, 0.4, min_size=2).groups == ((0, 1), (2, 3), (4,))


def test_sweep_up_ends_where_all_pictures_are_the_same():
    features = np.tile([[1.0, 0.0]], (5, 1))
    similarity = clusters.similarity_matrix(features)
    assert clusters.sweep_up(similarity, 3, 0.5).groups == ((0, 1, 2, 3, 4),)
    assert clusters.sweep_up_skipping(similarity, 3, 0.5) is None


def test_skipping_sweep_passes_over_an_exhausted_budget():
    features, _ = planted([5] * 6, noise=1.2)
    similarity = clusters.similarity_matrix(features)
    tight = partial(cliques.partition, node_budget=12)
    start = clusters.start_threshold(similarity)
    counted, skipping = (
        sweep(similarity, 6, start, partition_fn=tight) for sweep in (clusters.sweep_up, clusters.sweep_up_skipping)
    )
    assert not counted.exact
    assert skipping.exact
    assert skipping.threshold > counted.threshold


def test_sweep_down_returns_large_groups_only():
    features, labels = planted([8, 7, 3], strays=10, noise=0.3)
    similarity = clusters.similarity_matrix(features)
    found = clusters.sweep_down(similarity, 2, min_size=5)
    assert len(found.groups) == 2
    assert all(len(group) >= 5 for group in found.groups)
    assert all(len(set(labels[list(group)])) == 1 for group in found.groups)
    more_than_there_are = clusters.sweep_down(similarity, 18, min_size=5, floor=0.5)
    assert len(more_than_there_are.groups) == 2
    assert clusters.sweep_down(similarity, 1, min_size=20, floor=0.9).groups == ()
    assert clusters.sweep_down(-0.5 * (1 - np.eye(3)), 1, min_size=2).groups == ()


def test_unknown_number_of_groups_is_found_among_strays():
    features, labels = planted([9, 8, 7, 6], strays=15)
    found = clusters.stable(clusters.similarity_matrix(features), features)
    assert as_sets(cluster.members for cluster in found[:4]) == truth(labels)
    assert min(cluster.confidence for cluster in found[:4]) > max((c.confidence for c in found[4:]), default=0)


def test_nothing_is_found_where_no_pair_is_similar():
    assert clusters.stable(np.zeros((4, 4)), np.eye(4), start=0.0, min_size=5) == ()


def test_rank_prefers_large_and_tight_and_medoid_is_central():
    features = unit(np.array([[1, 0, 0], [1, 0.1, 0], [1, -0.1, 0], [0, 0, 1], [0, 1, 0.9], [0, 1, -0.9]], float))
    similarity = clusters.similarity_matrix(features)
    ranked = clusters.rank([(4, 5), (3,), (0, 1, 2)], similarity, features)
    assert [cluster.members for cluster in ranked] == [(0, 1, 2), (4, 5), (3,)]
    assert ranked[0].medoid == 0
    assert ranked[0].size == 3
    assert ranked[0].tightness == pytest.approx(similarity[[0, 0, 1], [1, 2, 2]].mean())
    assert ranked[1].medoid == 4  # a tie: the lowest index
    assert (ranked[2].tightness, ranked[2].score) == (0, 0)


def test_calibration_rejects_what_the_base_model_also_gives():
    features, labels = planted([6, 6], noise=0.2)
    similarity = clusters.similarity_matrix(features)
    ranked = clusters.rank(sorted(map(sorted, truth(labels))), similarity, features)
    shared = ranked[0]
    base, _ = planted([], strays=30, seed=5)
    base[:3] = features[shared.medoid]
    result = clusters.calibrate(ranked, features, base)
    assert result.evidence.tolist() == [False, True]
    assert result.rank.tolist() == [4 / 31, 1 / 31]
    assert result.base_similarity[0] == pytest.approx(1)
    assert result.own_similarity[0] == pytest.approx(similarity[shared.medoid, list(shared.members)].sum() / 5)


def test_a_single_picture_is_no_evidence():
    features = np.eye(3)
    ranked = clusters.rank([(0,)], clusters.similarity_matrix(features), features)
    result = clusters.calibrate(ranked, features[:1], features[1:])
    assert not result.evidence[0]
    assert result.rank[0] == 1


def test_null_rank_counts_base_clusters_that_score_as_high():
    made = lambda score: clusters.Cluster(members=(0, 1), medoid=0, tightness=score / 2, score=score)
    ranks = clusters.null_rank([made(3.0), made(1.0)], [made(1.0), made(0.5), made(2.0)])
    assert ranks.tolist() == [1 / 4, 3 / 4]
