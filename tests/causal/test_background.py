import numpy as np
import pytest

from dmsec_jax.causal import background
from dmsec_jax.causal.background import Background
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL

NAMES = ("a", "b", "c", "d")


def test_statements_become_matrices():
    known = background.knowledge(
        Background(required=(("a", "b"),), forbidden=(("b", "c"),), apart=(("a", "d"),), tiers=(("c",), ("a", "b"))),
        NAMES,
    )
    assert np.argwhere(known.required).tolist() == [[0, 1]]
    assert np.argwhere(known.forbidden).tolist() == [[0, 3], [1, 2], [3, 0]]
    never = background.impossible(known)
    assert never[0, 2]  # a is later than c
    assert not never[2, 0]
    assert not never[3, 2]  # d is in no tier
    assert not never[2, 3]
    decided = background.directions(known)
    assert [decided[0, 1], decided[2, 0], decided[2, 1], decided[1, 2], decided[2, 3]] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (Background(required=(("a", "z"),)), "about variables of the data, got z"),
        (Background(required=(("a", "b"),), forbidden=(("a", "b"),)), "got a -> b"),
        (Background(required=(("a", "b"),), apart=(("b", "a"),)), "got a -> b"),
        (Background(required=(("a", "b"),), tiers=(("b",), ("a",))), "got a -> b"),
        (Background(required=(("a", "b"), ("b", "c"), ("c", "a"))), "without a cycle"),
        (Background(tiers=(("a",), ("b", "a"))), "a twice"),
    ],
)
def test_contradictions_are_named(stated, said):
    with pytest.raises(ValueError, match="must be") as error:
        background.knowledge(stated, NAMES)
    assert said in str(error.value)


def test_required_edges_and_tiers_orient_what_the_data_leave_open():
    pag = np.full((4, 4), NONE, np.int8)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        pag[i, j] = pag[j, i] = CIRCLE
    known = background.knowledge(Background(required=(("a", "b"), ("a", "d")), tiers=(("b",), ("c",))), NAMES)
    found = background.orient(pag, known)
    assert (found[0, 1], found[1, 0]) == (ARROW, TAIL)
    assert (found[1, 2], found[2, 1]) == (ARROW, CIRCLE)
    assert (found[2, 3], found[3, 2]) == (CIRCLE, CIRCLE)
    assert found[0, 3] == NONE  # no link is invented
