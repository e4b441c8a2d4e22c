"""Other programs' graphs in the marks of `core.marks`."""

import numpy as np
import pytest

from benchmarks.causal import peers
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL

pytestmark = pytest.mark.slow  # needs what only the slow tests' environment has


@pytest.fixture
def found():
    """name -> the graph of 5000 rows of a -> c <- b, c -> d, and e - f."""
    rng = np.random.default_rng(1)
    a, b, e = rng.normal(size=(3, 5000))
    c = a + b + rng.normal(size=5000)
    d, f = c + rng.normal(size=5000), e + rng.normal(size=5000)
    data = np.stack([a, b, c, d, e, f], axis=1)

    def of(name):
        pytest.importorskip("andrey", reason="needs the causal-peers extra")
        return peers.PEERS[name](data).pag

    return of


@pytest.mark.parametrize("name", peers.PEERS)
def test_colliders_point_and_lone_links_are_open(found, name):
    marks = found(name)
    near = TAIL if name == "boss" else CIRCLE  # of a cause that may be hidden, nothing is known at the near end
    assert {(marks[i, j], marks[j, i]) for i, j in ((0, 2), (1, 2))} == {(ARROW, near)}
    assert (marks[2, 3], marks[3, 2]) == (ARROW, TAIL)
    assert (marks[4, 5], marks[5, 4]) == (CIRCLE, CIRCLE)
    assert (marks != NONE).sum() == 8
