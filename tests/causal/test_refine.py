"""Local searches from a likely skeleton."""

import numpy as np

from dmsec_jax.causal import climb, refine

SIZE, ROWS = 4, 5000
OFF = ~np.eye(SIZE, dtype=bool)
NONE = np.zeros((SIZE, SIZE), bool)


def edges(*pairs):
    found = NONE.copy()
    for i, j in pairs:
        found[i, j] = True
    return found


def covariance():
    """0 -> 2 <- 1, 2 -> 3."""
    total = np.linalg.inv(np.eye(SIZE) - edges((0, 2), (1, 2), (2, 3)) * 1.0)
    return total.T @ total


def refined(found, skeleton, required=NONE, may=(OFF, OFF), **options):
    probability = np.where(skeleton | skeleton.T, 0.9, 0.2)
    cfg, legal = climb.Config(**options), climb.stays_ancestral
    costs = climb.edge_costs(probability, ROWS, cfg.gamma)
    return refine.refined(np.stack(found), probability, covariance(), ROWS, costs, may, required, legal, cfg)


def test_the_best_start_ends_at_the_collider():
    chain = edges((3, 2), (2, 1), (1, 0))
    ends = refined([chain, chain.T], edges((0, 2), (1, 2)))
    assert len(ends) == 3
    best = min(ends, key=lambda end: end.score)
    true = edges((0, 2), (1, 2), (2, 3))
    assert ((best.directed | best.directed.T | best.bidirected) == (true | true.T)).all()
    assert best.directed[2, 3]
    assert not best.directed[2, :2].any()  # an arrow at the collider from both


def test_starts_follow_the_order_of_what_was_found():
    greedy, ordered = refined([edges((3, 2), (2, 1))], edges((1, 2), (2, 3)), max_moves=0)
    assert (ordered.directed == edges((3, 2), (2, 1))).all()
    assert not ordered.bidirected.any()
    assert not greedy.directed.any()  # no move, not even of its own


def test_required_edges_stay_whatever_the_data_and_the_order_say():
    required = edges((3, 0), (2, 1))
    for end in refined([edges((0, 3), (1, 2))], edges((0, 2), (1, 2), (2, 3)), required):
        assert (end.directed & required == required).all()
        assert not (end.bidirected & (required | required.T)).any()


def test_impossible_directions_are_not_taken():
    never = edges((0, 2), (1, 2))
    for end in refined([edges((0, 2), (1, 2))], edges((0, 2), (1, 2), (2, 3)), may=(OFF & ~never, OFF)):
        assert not (end.directed & never).any()
