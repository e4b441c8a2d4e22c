"""Floor 6, causal discovery on a table: the trained posterior over skeletons, the guided search, and what the data can tell of its result.

model = SPOT().fit(frame)
model.edge_probabilities_    model.pag_    model.coef_
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8
from scipy import stats
from sklearn.base import BaseEstimator

from dmsec_jax.causal import background, climb, cpdag, features, mag, pag, penalties, projection, refine, skeleton
from dmsec_jax.causal.background import Background
from dmsec_jax.checkpoints import skeleton as stored
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core import spread
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import AnyArray, Key, Params
from dmsec_jax.data import tables
from dmsec_jax.data.tables import Table
from dmsec_jax.methods import spot
from dmsec_jax.models.skeleton_net import SkeletonConfig

SHIPPED = Path(__file__).parent / "assets" / "skeleton"
"""The posterior that is used by default."""
Family = Literal["ancestral", "bow-free", "arid", "dag"]
CLASSES: dict[str, tuple[spot.AcyclicFn, spot.ClassFn, spot.OffendingFn]] = {
    "ancestral": (penalties.cyclic_too, penalties.acyclic_ancestral, penalties.not_ancestral),
    "bow-free": (penalties.squarings, penalties.bow_free, penalties.not_bow_free),
    "arid": (penalties.squarings, penalties.arid, penalties.not_arid),
    "dag": (penalties.squarings, penalties.unrestricted, lambda directed, bidirected: bidirected != 0),
}
"""Family of graphs -> its penalties, and the bidirected edges that offend it."""
LEGAL: dict[str, climb.LegalFn] = {
    "ancestral": climb.stays_ancestral,
    "bow-free": climb.stays_acyclic,
    "arid": climb.stays_arid,
    "dag": climb.stays_acyclic,
}
"""Family of graphs -> which moves of the local search stay in it."""
OnStep = Callable[[str, int, int], None]
"""(stage, done, of how many)."""


class Found(NamedTuple):
    """The searches' outcome: the graph of the lowest extended BIC, and all."""

    graph: spot.Graph
    bics: Float[np.ndarray, "R"]
    marks: Int8[np.ndarray, "R V V"]


class SPOT(BaseEstimator):
    """Learns which variables cause which from a table, hidden common causes allowed; in the style of scikit-learn.

    Args:
        restarts: random starts of the gradient search; local searches follow from each, and from one start more.
        family: of graphs; "dag" allows no hidden causes.
        transform: "standardise" each column, or replace it by its "normal-scores", the normal quantiles of its ranks, for skewed columns.
        background: what is known before the data.
        search, local: numbers of the gradient search, and of the local search that follows.
        posterior: folder of a trained posterior.
        seed: of the random starts.

    Attributes:
        edge_probabilities_: [V, V] in [0, 1], P(i and j adjacent | data), symmetric with zero diagonal; as the posterior says, or 0 and 1 where
            `background` knows.
        mag_, pag_: [V, V] int8 marks (`core.marks`): the graph of the lowest extended BIC, and what all graphs with the same independences share;
            with family "dag" all acyclic graphs without hidden causes, so that every edge is i -> j or i o-o j.
        coef_: [V, V], i -> j, in standard deviations of the (transformed) columns.
        omega_: [V, V] covariance of the errors; off the diagonal that of hidden common causes.
        bic_, bics_: extended BIC (`causal.climb.edge_costs`) of the graph, and of every local search; lower is better.
        marks_: [R + 1, V, V] of every local search.
        names_ (also `feature_names_in_`), n_features_in_, num_rows_.
        calibration_: of the posterior on held-out data sets, one entry for each number of variables, as its card has it.
        notes_: sentences that a reader of the outcome must know.
    """

    def __init__(
        self,
        *,
        restarts: int = 2,
        family: Family = "ancestral",
        transform: Literal["standardise", "normal-scores"] = "standardise",
        background: Background = Background(),  # noqa: B008 frozen
        search: spot.Config = spot.Config(),  # noqa: B008 frozen
        local: climb.Config = climb.Config(),  # noqa: B008 frozen
        posterior: str | Path = SHIPPED,
        seed: int = 0,
    ):
        self.restarts = restarts
        self.family = family
        self.transform = transform
        self.background = background
        self.search = search
        self.local = local
        self.posterior = posterior
        self.seed = seed

    def fit(self, X: Any, y: None = None, *, on_step: OnStep | None = None) -> "SPOT":
        """Learns from a data frame, an array [N, V] or a `Table`.

        Args:
            y: ignored, for scikit-learn.
            on_step: called as the work goes on.

        Raises:
            ValueError: on what `data.tables.check` refuses, on wrong options, and on knowledge that contradicts itself.
        """
        require(self.family in CLASSES, "family", f"one of {', '.join(CLASSES)}", repr(self.family), "choose one")
        require(self.restarts >= 1, "restarts", "at least 1", self.restarts, "raise it")
        report = on_step or (lambda stage, done, total: None)
        table = X if isinstance(X, Table) else tables.of(X)
        tables.check(table)
        known = background.knowledge(self.background, table.names)
        posterior = stored.read(self.posterior, features.COUNT)
        corr = features.correlation(_transformed(table.values, self.transform), list(table.names))
        rows, size = table.values.shape

        report("edge probabilities", 0, 1)
        probability = np.array(linked(posterior.params, posterior.net, corr, float(rows)))
        self.edge_probabilities_ = _with_knowledge(probability, known)
        report("edge probabilities", 1, 1)
        guide = _guide(self.edge_probabilities_, known, self.family)
        key, covariance = jax.random.key(self.seed), regularised(corr, rows)
        found = _searched(key, covariance, rows, guide, np.asarray(known.required), self, report)
        graph = found.graph
        self.coef_, self.omega_ = np.asarray(graph.directed), np.asarray(graph.omega)
        self.bic_, self.bics_, self.marks_ = float(graph.bic), found.bics, found.marks
        self.mag_ = np.asarray(graph.marks)
        report("orientations", 0, 1)
        self.pag_ = _shared(self.mag_, known, self.family)
        report("orientations", 1, 1)
        self.names_, self.feature_names_in_ = table.names, np.array(table.names, dtype=object)
        self.n_features_in_, self.num_rows_ = size, rows
        self.calibration_ = tuple(posterior.card.get("calibration", ()))
        self.notes_ = (
            *_notes(table, posterior, self.transform, self.bics_),
            *_agreement(self.edge_probabilities_, self.mag_),
        )
        return self


def regularised(corr: Float[np.ndarray, "V V"], num_rows: int) -> Float[np.ndarray, "V V"]:
    """The matrix that is searched: with no more rows than variables shrunk towards independence, as the features are, for it cannot be inverted."""
    size = len(corr)
    if num_rows > size + 1:
        return corr
    shrink = np.float32(min(0.5, size / (20 * num_rows)))
    return (1 - shrink) * corr + shrink * np.eye(size, dtype=np.float32)


@functools.partial(jax.jit, static_argnames="net")
def linked(
    params: Params, net: SkeletonConfig, corr: Float[AnyArray, "V V"], num_rows: float | Float[AnyArray, ""]
) -> Float[Array, "V V"]:
    """`skeleton.edge_probabilities`, compiled once for each number of variables."""
    return skeleton.edge_probabilities(params, net, corr, num_rows)


@jax.jit
def _begun(keys: Key, covariance, guide: spot.Guide, cfg: spot.Config) -> spot.State:
    return spread.whole(jax.vmap(lambda key: spot.init(key, covariance, guide, cfg))(spread.even(keys)))


@functools.partial(jax.jit, static_argnames=("acyclic_fn", "class_fn"))
def _advanced(keys, state, covariance, num_rows, guide, cfg, acyclic_fn, class_fn):
    def one(key, state):
        own = jax.random.fold_in(key, state.i)
        options = {"acyclic_fn": acyclic_fn, "class_fn": class_fn}
        return spot.step(own, state, covariance, num_rows, guide, cfg, **options)

    # left to the compiler, every device of a TPU would invert the matrices of all starts
    return spread.whole(spread.apart(jax.vmap(one), keys, state))


@functools.partial(jax.jit, static_argnames="offending_fn")
def _finished(state, covariance, num_rows, cfg, required, offending_fn):
    options = {"offending_fn": offending_fn, "required": required}
    return jax.lax.map(lambda one: spot.finish(one, covariance, num_rows, cfg, **options), state)


def _searched(key, covariance, rows: int, guide: spot.Guide, required, model: SPOT, report: OnStep) -> Found:
    """`spot.search` with the same guide for every start, one step at a time, so that progress can be shown."""
    acyclic_fn, class_fn, offending_fn = CLASSES[model.family]
    cfg, stage = model.search, f"search from {model.restarts} starts"
    num_rows = jnp.float32(rows)
    keys = jax.random.split(key, model.restarts)
    report(stage, 0, cfg.num_steps + 1)
    state = _begun(keys, covariance, guide, cfg)
    for i in range(cfg.num_steps):
        state, info = _advanced(keys, state, covariance, num_rows, guide, cfg, acyclic_fn, class_fn)
        finite = bool(info.finite.any())
        require(finite, "the search", "finite", f"NaN in step {i + 1}", "lower search.learning_rate")
        report(stage, i + 1, cfg.num_steps + 1)
    rough = jax.device_get(_finished(state, covariance, num_rows, cfg, required, offending_fn))
    report(stage, cfg.num_steps + 1, cfg.num_steps + 1)
    return refined(rough.directed != 0, guide, covariance, rows, required, model, report)


def refined(orders, guide: spot.Guide, covariance, rows: int, required, model: SPOT, report: OnStep) -> Found:
    """Local searches from the likely skeleton, oriented by each of `orders` [R, V, V] and once by likelihood; the fits of all."""
    stage, count = "local search", len(orders) + 1
    report(stage, 0, count)
    likely = guide.probability > model.search.exclude
    may = np.asarray(guide.directed & likely), np.asarray(guide.bidirected & likely)
    options = {"legal_fn": LEGAL[model.family], "cfg": model.local}
    probability = np.asarray(guide.probability)
    costs = climb.edge_costs(probability, rows, model.local.gamma)
    ends = refine.refined(np.asarray(orders), probability, covariance, rows, costs, may, required, **options)
    directed, bidirected = (np.stack([getattr(end, part) for end in ends]) for part in ("directed", "bidirected"))
    graphs = jax.device_get(_fitted(directed, bidirected, covariance, jnp.float32(rows)))
    report(stage, count, count)
    edges = directed | directed.swapaxes(1, 2) | bidirected
    beyond = costs - climb.edge_costs(probability, rows, 0.0)  # BIC's own price is in the fits
    graphs = graphs._replace(bic=graphs.bic + (beyond * edges).sum(axis=(1, 2)) / 2)
    known = np.isfinite(graphs.bic)
    cure = "try normal-scores or fewer variables"
    require(bool(known.any()), "the fit", "finite", "no likelihood for any start", cure)
    best = int(np.nanargmin(graphs.bic))
    return Found(jax.tree.map(lambda leaf: leaf[best], graphs), graphs.bic, graphs.marks)


@jax.jit
def _fitted(directed, bidirected, covariance, num_rows) -> spot.Graph:
    def one(edges):
        with jax.default_matmul_precision("highest"):
            fit = mag.refit(*edges, covariance, num_rows)
        return spot.Graph(*fit, projection.maximal_ancestral(*edges))

    return jax.lax.map(one, (directed, bidirected))


def _transformed(values: Float[np.ndarray, "N V"], transform: str) -> Float[np.ndarray, "N V"]:
    """The columns before they are standardised."""
    kinds = ("standardise", "normal-scores")
    require(transform in kinds, "transform", f"one of {', '.join(kinds)}", repr(transform), "choose one")
    if transform == "standardise":
        return values
    return stats.norm.ppf(stats.rankdata(values, axis=0) / (len(values) + 1))


def _with_knowledge(probability, known) -> Float[np.ndarray, "V V"]:
    """1 where an edge is required, 0 where there can be none."""
    probability[known.forbidden & known.forbidden.T] = 0.0
    probability[known.required | known.required.T] = 1.0
    return probability


def _guide(probability, known, family: str) -> spot.Guide:
    """Which edges may be: a required one alone on its pair, none against time."""
    guide = spot.guide_dag(probability) if family == "dag" else spot.guide_mag(probability)
    decided = known.required | known.required.T
    allowed = ~background.impossible(known) & (~decided | known.required)
    return guide._replace(directed=guide.directed & allowed, bidirected=guide.bidirected & ~decided)


def _shared(marks, known, family: str) -> Int8[np.ndarray, "V V"]:
    """The marks that the data, and what is known, tell."""
    if family == "dag":
        return cpdag.of_dag(marks, background.directions(known))
    return background.orient(pag.of_mag(marks), known)


def _notes(table: Table, posterior: Posterior, transform: str, bics) -> tuple[str, ...]:
    """What a reader must know of this table."""
    rows, size = table.values.shape
    notes = []
    recipe = posterior.card.get("recipe", {}).get("train", {})
    low, high = recipe.get("rows", (rows, rows))
    sizes = recipe.get("sizes", (size,))
    if not low <= rows <= high:
        notes.append(f"{rows} rows: the edge probabilities were learnt on {low} to {high} rows and may be off outside.")
    if not min(sizes) <= size <= max(sizes):
        known = f"{min(sizes)} to {max(sizes)} variables"
        notes.append(f"{size} variables: the edge probabilities were learnt on {known} and may be off outside.")
    if rows <= size + 1:
        notes.append(
            "There are no more rows than variables: correlations were shrunk towards 0, and little can be told."
        )
    skew = np.abs(stats.skew(table.values, axis=0))
    if transform == "standardise" and (skew > 2).any():
        names = ", ".join(table.names[i] for i in np.flatnonzero(skew > 2)[:10])
        notes.append(f"Strongly skewed columns: {names}. Correlations of such columns mislead; try normal-scores.")
    few = [table.names[i] for i in range(size) if len(np.unique(table.values[:, i])) <= 5]
    if few:
        notes.append(
            f"Columns of five values or fewer: {', '.join(few[:10])}. A linear model with noise may not suit them."
        )
    worse = int((bics > np.nanmin(bics) + 1).sum())  # graphs that say the same have the same, up to rounding
    if worse:
        notes.append(
            f"{worse} of {len(bics)} local searches ended at a higher extended BIC; the graph of the lowest is shown."
        )
    return tuple(notes)


def _agreement(probability, mag) -> tuple[str, ...]:
    """A sentence where the search's graph and the probabilities are of different density."""
    expected, found = float(np.triu(probability, 1).sum()), int(np.triu(mag != 0, 1).sum())
    if 0.75 * expected <= found <= 1.33 * expected + 1:
        return ()
    return (
        f"The probabilities expect {expected:.0f} links, the graph that fits best has {found}: the two disagree, as they do where effects are not "
        "linear or the search has not found the best graph. Trust links that both have.",
    )
