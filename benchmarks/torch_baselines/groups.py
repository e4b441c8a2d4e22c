"""Similarities of all pairs of features, and groups of near-duplicates by repeated maximum cliques (`Cluster.py`)."""

from typing import Any

import networkx as nx
import numpy as np
import torch

from benchmarks.torch_baselines.networks import whole
from benchmarks.torch_baselines.passes import Outcome, Run


def public(features: Any, threshold: float) -> Run:
    """A cosine at a time, all maximal cliques enumerated anew after every removal."""
    features = whole(features)
    count = len(features)

    def run() -> Outcome:
        similarity = torch.zeros(count, count)
        for i in range(count):
            for j in range(count):
                if i != j:
                    similarity[i, j] = torch.nn.functional.cosine_similarity(features[i], features[j], dim=0)
        graph = _graph(similarity.numpy(), threshold)
        return _outcome(similarity, _removed(graph, lambda graph: nx.find_cliques(graph)))

    return run


def best(features: Any, threshold: float) -> Run:
    """One matrix product; each connected component on its own, so that a removal enumerates little anew."""
    features = whole(features)

    def run() -> Outcome:
        similarity = (features @ features.T).fill_diagonal_(0.0)
        graph, groups = _graph(similarity.numpy(), threshold), []
        for part in list(nx.connected_components(graph)):
            groups += _removed(graph.subgraph(part).copy(), lambda graph: nx.find_cliques(graph))
        return _outcome(similarity, groups)

    return run


def _graph(similarity: np.ndarray, threshold: float) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(len(similarity)))
    graph.add_edges_from(np.argwhere(np.triu(similarity.round(6) >= threshold, 1)).tolist())
    return graph


def _removed(graph: nx.Graph, enumerate_fn) -> list[list[int]]:
    groups = []
    while graph.number_of_nodes():
        clique = max(enumerate_fn(graph), key=len)
        groups.append(clique)
        graph.remove_nodes_from(clique)
    return groups


def _outcome(similarity: torch.Tensor, groups: list[list[int]]) -> Outcome:
    sizes = np.array(sorted((len(group) for group in groups), reverse=True), np.float32)
    return {"similarity": lambda: similarity.numpy(), "sizes": lambda: sizes}
