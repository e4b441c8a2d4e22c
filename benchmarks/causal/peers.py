"""Other programs for graphs with hidden causes, each at its usual level, with marks as `core.marks` has them.

causal-learn's FCI, and FCI, GFCI and BOSS of andrey: the `causal-peers` extra. BOSS (Andrews et al. 2023) knows no hidden causes, but leads on links
where there are few.
"""

import contextlib
import io
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL

ALPHA = 0.01


class Answer(NamedTuple):
    pag: Int8[np.ndarray, "V V"]
    seconds: float


Peer = Callable[[Float[np.ndarray, "N V"]], Answer]


def fci(data) -> Answer:
    """FCI of causal-learn."""
    from causallearn.search.ConstraintBased.FCI import fci as search

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints edges whatever `verbose` says
        graph, _ = search(data, "fisherz", ALPHA, show_progress=False, verbose=False)
    seconds = time.perf_counter() - began
    codes = {0: NONE, -1: TAIL, 1: ARROW, 2: CIRCLE}
    ends = np.vectorize(codes.__getitem__, otypes=[np.int8])(np.asarray(graph.graph, int))
    return Answer(ends.T, seconds)  # theirs has the mark at the row


def fci_andrey(data) -> Answer:
    """FCI of andrey."""
    import andrey

    return _of_andrey(lambda: andrey.fci(data, alpha=ALPHA))


def gfci_andrey(data) -> Answer:
    """GFCI of andrey."""
    import andrey

    return _of_andrey(lambda: andrey.gfci(data, alpha=ALPHA))


def boss_andrey(data) -> Answer:
    """BOSS of andrey at twice the price that BIC gives an edge, as is usual with it: at once it finds many more links than there are. Links that
    its CPDAG does not direct end in circles."""
    import andrey

    found = _of_andrey(lambda: andrey.boss(data, lambda_value=2.0))
    undirected = (found.pag == TAIL) & (found.pag.T == TAIL)
    return found._replace(pag=np.where(undirected, np.int8(CIRCLE), found.pag))


def _of_andrey(search) -> Answer:
    began = time.perf_counter()
    marks = search().structure.to_numpy()
    seconds = time.perf_counter() - began
    return Answer(np.array([NONE, TAIL, ARROW, CIRCLE], np.int8)[marks].T, seconds)


PEERS: dict[str, Peer] = {"fci": fci, "fci-andrey": fci_andrey, "gfci": gfci_andrey, "boss": boss_andrey}
