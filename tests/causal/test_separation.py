"""m-separation against the definition by paths."""

import jax
import mixed_graphs
import numpy as np

from dmsec_jax.causal import separation

SEPARATED = jax.jit(jax.vmap(lambda d, b, sets: jax.vmap(lambda z: separation.separated(d, b, z))(sets), (0, 0, None)))


def test_every_pair_and_set_is_judged_as_by_the_paths_between():
    directed, bidirected = mixed_graphs.random_admgs(2, 25, 5, 0.35, 0.25)
    sets = mixed_graphs.subsets(5)
    found = np.asarray(SEPARATED(directed, bidirected, sets))
    checked = 0
    for n, (d, b) in enumerate(zip(directed, bidirected, strict=True)):
        for m, inside in enumerate(sets):
            given = set(np.flatnonzero(inside))
            outside = [v for v in range(5) if v not in given]
            for k, i in enumerate(outside):
                for j in outside[k + 1 :]:
                    want = not mixed_graphs.connected(d, b, i, j, given)
                    assert found[n, m, i, j] == found[n, m, j, i] == want
                    checked += 1
    assert checked == 25 * 10 * 8
    assert 0.2 < found.mean() * 25 / 5 < 0.8  # both answers occur


def test_given_and_equal_vertices_are_never_separated():
    nothing = np.zeros((3, 3), bool)
    found = np.asarray(jax.jit(separation.separated)(nothing, nothing, np.array([True, False, False])))
    assert np.argwhere(found).tolist() == [[1, 2], [2, 1]]
