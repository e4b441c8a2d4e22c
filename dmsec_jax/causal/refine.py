"""From a likely skeleton to the graph of the least extended BIC: local searches from several orientations of the same edges.

One start takes the edges in the order in which they raise the likelihood, without hidden causes; the others point from what an earlier search has
first to what it has later. Of that search nothing else is kept: where data do not give directions away by their variances, it ends with many
edges too many, from which no single move leads back.
"""

import numpy as np
from jaxtyping import Bool, Float

from dmsec_jax.causal import climb, graphs
from dmsec_jax.causal.climb import Climbed, Config, Edges, LegalFn, Matrix

LIKELY = 0.5
REQUIRED = -1e6
"""The cost of an edge that no likelihood outweighs."""


def refined(
    found: Bool[np.ndarray, "R V V"],
    probability: Float[np.ndarray, "V V"],
    covariance: Matrix,
    num_rows: float,
    costs: Matrix,
    may: tuple[Edges, Edges],
    required: Edges,
    legal_fn: LegalFn,
    cfg: Config,
) -> list[Climbed]:
    """R + 1 graphs: from the greedy start, and from the order of each acyclic i -> j of `found`.

    Args:
        costs: as of `climb.climb`, for example `climb.edge_costs`.
        may: which i -> j and i <-> j may be; symmetric in the pairs that have any.
        required: i -> j that stay; together acyclic.
    """
    free = ~(required | required.T)
    may = may[0] & free, may[1] & free
    likely = (probability > LIKELY) & free
    starts = [_greedy(likely, covariance, num_rows, may[0], required, legal_fn, cfg)]
    starts += [_ordered(likely, directed, may, required, legal_fn) for directed in found]
    return [climb.climb(*start, covariance, num_rows, costs, may, legal_fn, cfg) for start in starts]


def _greedy(likely, covariance, num_rows, directed, required, legal_fn, cfg) -> tuple[Edges, Edges]:
    none = np.zeros_like(required)
    costs = np.full(covariance.shape, REQUIRED)
    start = climb.climb(required, none, covariance, num_rows, costs, (likely & directed, none), legal_fn, cfg)
    return start.directed, start.bidirected


def _ordered(likely, earlier, may, required, legal_fn) -> tuple[Edges, Edges]:
    """Likely edges from the earlier vertex to the later, or as else they may be."""
    above = np.asarray(graphs.ancestors(earlier)).sum(axis=0)  # a cause has fewer ancestors than its effect
    place = np.argsort(np.argsort(above, kind="stable"))
    directed, bidirected = required.copy(), np.zeros_like(required)
    for i, j in np.argwhere(np.triu(likely)).tolist():
        cause, effect = (i, j) if place[i] < place[j] else (j, i)
        for a, b in ((cause, effect), (effect, cause)):
            directed[a, b] = may[0][a, b] and not directed[b, a]
            if directed[a, b] and not legal_fn(directed, bidirected, a, b):
                directed[a, b] = False
    return directed, bidirected
