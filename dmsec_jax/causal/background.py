"""What somebody knows before the data, by the names of variables: causes that are certain, causes that are impossible, and order in time."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int8

from dmsec_jax.causal.graphs import ancestors
from dmsec_jax.causal.sem import Knowledge
from dmsec_jax.core.checks import require
from dmsec_jax.core.marks import ARROW, NONE, TAIL

Pairs = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """Knowledge by name.

    required: (cause, effect): this edge is in the graph.
    forbidden: (cause, effect): this edge is not; the other direction and a hidden common cause may be.
    apart: (one, other): there is no edge at all.
    tiers: groups of variables in order of time; none causes one of an earlier group. Those not named may be anywhere.
    """

    required: Pairs = ()
    forbidden: Pairs = ()
    apart: Pairs = ()
    tiers: tuple[tuple[str, ...], ...] = ()


def knowledge(background: Background, names: tuple[str, ...]) -> Knowledge:
    """The same as matrices over `names`; one not in any tier has tier NaN.

    Raises:
        ValueError: on a name that is no variable, a variable in two tiers, and statements that contradict each other.
    """
    place = {name: i for i, name in enumerate(names)}
    listed = [
        name
        for group in (background.required, background.forbidden, background.apart)
        for pair in group
        for name in pair
    ]
    listed += [name for tier in background.tiers for name in tier]
    unknown = sorted({name for name in listed if name not in place})
    cure = f"the variables are {', '.join(names)[:200]}"
    require(not unknown, "background", "about variables of the data", ", ".join(unknown), cure)
    required, forbidden = np.zeros((2, len(names), len(names)), bool)
    for cause, effect in background.required:
        required[place[cause], place[effect]] = True
    for cause, effect in (*background.forbidden, *background.apart, *((b, a) for a, b in background.apart)):
        forbidden[place[cause], place[effect]] = True
    tier = np.full(len(names), np.nan, np.float32)
    for level, group in enumerate(background.tiers):
        for name in group:
            free = np.isnan(tier[place[name]])
            require(bool(free), "tiers", "of different variables", f"{name} twice", "keep it in one tier")
            tier[place[name]] = level
    found = Knowledge(required, forbidden, tier)
    both = [f"{names[i]} -> {names[j]}" for i, j in np.argwhere(required & impossible(found))]
    require(not both, "background", "free of contradictions", ", ".join(both), "drop the edge or what forbids it")
    cyclic = bool((required & np.asarray(ancestors(required)).T).any())
    require(not cyclic, "required", "without a cycle", "a cycle", "drop one of its edges")
    return found


def impossible(known: Knowledge) -> Bool[np.ndarray, "V V"]:
    """[i, j]: i -> j cannot be."""
    return np.asarray(known.forbidden) | (known.tier[:, None] > known.tier[None])


def directions(known: Knowledge) -> Bool[np.ndarray, "V V"]:
    """[i, j]: if one of the two causes the other, it is i."""
    return np.asarray(known.required) | impossible(known).T


def orient(pag: Int8[np.ndarray, "V V"], known: Knowledge) -> Int8[np.ndarray, "V V"]:
    """A partial ancestral graph with the marks that required edges and tiers fix; what would follow from those marks is not worked out."""
    pag = pag.copy()
    later = (known.tier[:, None] < known.tier[None]) & (pag != NONE)
    pag[later] = ARROW
    fixed = np.asarray(known.required) & (pag != NONE)
    pag[fixed], pag.T[fixed] = ARROW, TAIL
    return pag
