"""Which knobs drive leakage: the graph that `dmsec discover` learns from the matrix's own table, and what the interventions say of it.

The knobs of these models were drawn at random, each apart from the others, so a knob that an outcome depends on causes it: that is the yardstick.
The graph does not know it. It knows only that knobs come before outcomes.

    effect      Spearman's correlation of knob and outcome within sets is not zero (Student, Holm over all pairs): the knob has some effect
    adjacent    the graph has a link between the two: by its own account no other outcome explains the effect
    ancestor    the graph has a directed path from knob to outcome: what an effect is, by its own account

Links between knobs are all false.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.matrix.tables import Row
from dmsec_jax.causal.background import Background
from dmsec_jax.causal.graphs import ancestors
from dmsec_jax.core.marks import ARROW, NONE, TAIL
from dmsec_jax.data.tables import Table
from dmsec_jax.discovery import SPOT
from dmsec_jax.metrics import evidence
from dmsec_jax.report import result
from dmsec_jax.report.graph_files import Edge, edges

KNOBS = ("n0", "steps", "rank", "rate", "sigma0", "budget", "prior_weight")
OUTCOMES = ("AS_finextract", "separation", "imitation", "diversity")
"""`separation` in place of an AUC, which ends at 1."""
LEVEL = 0.05


class Effect(NamedTuple):
    """Of a knob on an outcome."""

    knob: str
    outcome: str
    rho: float
    """Spearman's, within sets."""
    p: float
    holm: float
    adjacent: bool
    ancestor: bool
    probability: float
    """Of a link, as the skeleton posterior says."""

    @property
    def told(self) -> bool:
        return self.holm < LEVEL


class Learnt(NamedTuple):
    """Graph and interventions."""

    names: tuple[str, ...]
    edges: tuple[Edge, ...]
    effects: tuple[Effect, ...]
    knob_links: int
    rows: int
    notes: tuple[str, ...]


class Agreement(NamedTuple):
    """Of what a graph says with the effects; 1 where there was nothing to be wrong about."""

    precision: float
    recall: float
    found: int
    true: int


def learn(rows: Sequence[Row], knobs: Sequence[str] = KNOBS, outcomes: Sequence[str] = OUTCOMES) -> Learnt:
    """Learns the graph of a table and tests the effects in it.

    Raises:
        ValueError: on what `dmsec discover` refuses, for example too few rows.
    """
    names = (*knobs, *outcomes)
    values = np.array([[float(row[name]) for name in names] for row in rows])
    sets = np.unique([row["set"] for row in rows], return_inverse=True)[1]
    first = len(knobs)
    values[:, first:] -= np.stack([values[sets == one, first:].mean(0) for one in range(sets.max() + 1)])[sets]
    model = SPOT(transform="normal-scores", background=Background(tiers=(tuple(knobs), tuple(outcomes))))
    model.fit(Table(names, values))
    marks = np.asarray(model.mag_)
    causes = np.asarray(ancestors((marks == ARROW) & (marks.T == TAIL)))
    pairs = [(i, j) for i in range(first) for j in range(first, len(names))]
    tests = [within(values[:, i], values[:, j], sets) for i, j in pairs]
    adjusted = evidence.holm([p for _, p in tests])
    effects = tuple(
        Effect(
            knob=names[i],
            outcome=names[j],
            rho=rho,
            p=p,
            holm=float(holm),
            adjacent=bool(marks[i, j] != NONE),
            ancestor=bool(causes[i, j]),
            probability=float(model.edge_probabilities_[i, j]),
        )
        for (i, j), (rho, p), holm in zip(pairs, tests, adjusted, strict=True)
    )
    between = int(np.triu(marks[:first, :first] != NONE, 1).sum())
    listed = tuple(edges(model.pag_, model.edge_probabilities_, model.coef_))
    return Learnt(names, listed, effects, between, len(rows), model.notes_)


def within(knob: np.ndarray, outcome: np.ndarray, sets: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation of two columns [N] within sets, by ranks that are centred in each, and its two-sided p-value (Student)."""
    ranks = np.zeros((2, len(sets)))
    for one in np.unique(sets):
        inside = sets == one
        for rank, column in zip(ranks, (knob, outcome), strict=True):
            rank[inside] = stats.rankdata(column[inside])
            rank[inside] -= rank[inside].mean()
    norms = np.sqrt(np.square(ranks).sum(1))
    if not norms.all():
        return 0.0, 1.0
    rho = float(ranks[0] @ ranks[1] / norms.prod())
    freedom = len(sets) - len(np.unique(sets)) - 1
    t = rho * np.sqrt(freedom / max(1 - rho**2, 1e-15))
    return rho, float(2 * stats.t.sf(abs(t), freedom))


def agreement(effects: Sequence[Effect], says) -> Agreement:
    """Of `says(effect)` with the effects that the interventions show."""
    said, true = np.array([says(one) for one in effects]), np.array([one.told for one in effects])
    hits = int((said & true).sum())
    share = lambda count: 1.0 if count == 0 else hits / count
    return Agreement(share(int(said.sum())), share(int(true.sum())), int(said.sum()), int(true.sum()))


VIEWS = {
    "adjacent": lambda one: one.adjacent,
    "ancestor": lambda one: one.ancestor,
    "posterior": lambda one: one.probability > 0.5,
}
"""What a graph says of a knob and an outcome, by the name of the method in result rows."""


def result_rows(learnt: Learnt) -> list[result.Row]:
    """Tidy rows: every effect, and how far the graph agrees with them."""
    rows = []
    for one in learnt.effects:
        case = {"knob": one.knob, "outcome": one.outcome, "p": one.p, "holm": one.holm}
        case |= {"adjacent": int(one.adjacent), "ancestor": int(one.ancestor), "probability": one.probability}
        names = {"bench": "matrix", "metric": "effect", "unit": "rank correlation", "method": "intervention"}
        rows.append(result.Row(value=one.rho, n=learnt.rows, case=case, **names))
    for method, says in VIEWS.items():
        found = agreement(learnt.effects, says)
        for metric in ("precision", "recall"):
            count = found.found if metric == "precision" else found.true
            names = {"bench": "matrix", "metric": metric, "unit": "share", "method": method}
            rows.append(result.Row(value=getattr(found, metric), n=count, case={"pairs": "knob, outcome"}, **names))
    names = {"bench": "matrix", "metric": "false_links", "unit": "pairs of knobs", "method": "adjacent"}
    return [*rows, result.Row(value=float(learnt.knob_links), n=learnt.rows, **names)]
