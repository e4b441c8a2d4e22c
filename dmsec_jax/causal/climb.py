"""Local search by likelihood and number of edges among graphs with hidden causes: one pair at a time, the best move first, with a tabu list.

A pair is in one of four states: no edge, i -> j, i <- j, i <-> j; a move changes one pair. The likelihood is a product over districts (sets joined
by i <-> j; Tian and Pearl, UAI 2002), each with its parents,

    -2 log L = n sum_D [log det Omega_D + tr(Omega_D^-1 R_D^T S R_D)] + const,

so a move changes the terms of two districts only (Triantafillou and Tsamardinos, UAI 2016). Its gain is bounded by fitting those
of the pair again whose parents or siblings change, with all else as it is: a step each of residual iterative conditional fitting. A move that is made
has its districts fitted to the end. The score is the same for data in any units, unlike that of the gradient search, which this follows.

On the host, in float64: districts have any size, and a move touches few numbers.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dmsec_jax.causal import penalties
from dmsec_jax.core.config import config

Matrix = Float[np.ndarray, "V V"]
Edges = Bool[np.ndarray, "V V"]
LegalFn = Callable[[Edges, Edges, int, int], bool]
"""(directed, bidirected, i, j): whether the edge on the pair (i, j), the last that was changed, leaves the graph in its class."""
SWEEPS, CHANGE = 30, 1e-2
"""Of conditional fitting: at most so many, until -2 log L falls by less."""


@config
class Config:
    """gamma: of the extended BIC (`edge_costs`); 0 is BIC.

    max_moves: at most. tabu: moves for which a changed pair stays, or half the number of pairs.
    patience: moves without a better graph after which the search ends.
    """

    gamma: float = 0.5
    max_moves: int = 5000
    tabu: int = 10
    patience: int = 30


class Climbed(NamedTuple):
    directed: Edges
    bidirected: Edges
    score: float
    """-2 log L + the costs of edges, up to a constant of the data."""
    moves: int


def edge_costs(probability: Float[np.ndarray, "V V"], num_rows: float, gamma: float) -> Matrix:
    """log n + 4 gamma log V (1 - p), of an edge of probability p.

    At p = 0 this is the extended BIC (Foygel and Drton, NeurIPS 2010), for where BIC would take chance for edges, so many pairs there are; that part
    is paid as far as an edge is in doubt, since those that are likely without it are few.
    """
    return math.log(num_rows) + 4 * gamma * math.log(len(probability)) * (1 - np.asarray(probability, np.float64))


def climb(
    directed: Edges,
    bidirected: Edges,
    covariance: Matrix,
    num_rows: float,
    costs: Matrix,
    may: tuple[Edges, Edges],
    legal_fn: LegalFn,
    cfg: Config,
) -> Climbed:
    """The best graph met on the way from the given one, which is in the class and has at most one edge on a pair.

    Args:
        costs: [i, j], symmetric, of an edge on the pair, in units of -2 log L (`edge_costs`).
        may: which i -> j and i <-> j may be tried; pairs without any stay as they are.
    """
    state = _State(directed, bidirected, covariance, num_rows, costs)
    open_pairs = [pair for pair in itertools.combinations(range(len(state.parents)), 2) if _choices(may, *pair)]
    touching = {v: [pair for pair in open_pairs if v in pair] for v in range(len(state.parents))}
    gains = {}
    for pair in open_pairs:
        _regain(gains, state, may, *pair)
    best = (state.score(), *state.edges())
    free_again = dict.fromkeys(open_pairs, 0)
    since = moves = 0
    while moves < cfg.max_moves and since <= cfg.patience:
        now = state.score()
        for gain, (i, j, kind) in sorted((gain, move) for move, gain in gains.items()):
            if free_again[i, j] > moves and now + gain >= best[0] - CHANGE:
                continue  # unless nothing better was ever met
            was, around = state.kind(i, j), state.around(i, j)
            state.put(i, j, kind)
            if legal_fn(state.directed, state.bidirected, i, j):
                break
            state.put(i, j, was)
        else:
            break
        state.settle(around)
        moves, since = moves + 1, since + 1
        free_again[i, j] = moves + min(cfg.tabu, len(open_pairs) // 2)
        if state.score() < best[0] - CHANGE:
            best, since = (state.score(), *state.edges()), 0
        for pair in {pair for v in around for pair in touching[v]}:
            _regain(gains, state, may, *pair)
    return Climbed(best[1], best[2], best[0], moves)


def stays_acyclic(directed: Edges, bidirected: Edges, i: int, j: int) -> bool:
    """No directed cycle through the pair; of bow-free graphs too, as a pair has one edge."""
    if not (directed[i, j] or directed[j, i]):
        return True
    cause, effect = (i, j) if directed[i, j] else (j, i)
    return not _reached(directed, effect)[cause]


def stays_ancestral(directed: Edges, bidirected: Edges, i: int, j: int) -> bool:
    """Besides, no i <-> j between a vertex and its ancestor."""
    if bidirected[i, j]:
        return not (_reached(directed, i)[j] or _reached(directed, j)[i])
    if not (directed[i, j] or directed[j, i]):
        return True
    cause, effect = (i, j) if directed[i, j] else (j, i)
    below = _reached(directed, effect)
    return not (below[cause] or bidirected[_reached(directed.T, cause)][:, below].any())


def stays_arid(directed: Edges, bidirected: Edges, i: int, j: int) -> bool:
    """Acyclic, and no arborescence of two vertices or more within one district."""
    return stays_acyclic(directed, bidirected, i, j) and not bool(penalties.not_arid(directed, bidirected).any())


def _reached(directed, start) -> Bool[np.ndarray, "V"]:
    """`start` and all that can be reached from it."""
    found = np.zeros(len(directed), bool)
    found[start] = True
    new = [start]
    while len(new):
        reach = directed[new].any(axis=0) & ~found
        found |= reach
        new = np.flatnonzero(reach)
    return found


NOTHING, FORTH, BACK, BOTH = range(4)
_HEADS = {NOTHING: set(), FORTH: {1}, BACK: {0}, BOTH: {0, 1}}
"""At which ends of the pair an edge has arrows: the vertices that it helps to explain."""


def _choices(may, i, j) -> list[int]:
    directed, bidirected = may
    named = ((FORTH, directed[i, j]), (BACK, directed[j, i]), (BOTH, bidirected[i, j]))
    found = [kind for kind, allowed in named if allowed]
    return [NOTHING, *found] if found else []


def _regain(gains, state: "_State", may, i, j) -> None:
    """Sets what each move of this pair would change."""
    now, around = state.kind(i, j), state.around(i, j)
    before = state.held(around)
    for kind in _choices(may, i, j):
        gains.pop((i, j, kind), None)
        if kind != now:
            state.put(i, j, kind)
            cost = state.costs[i, j] * ((kind != NOTHING) - (now != NOTHING))
            ends = sorted(_HEADS[kind] | _HEADS[now])
            gains[i, j, kind] = state.tried(around, [(i, j)[end] for end in ends]) - before + cost
    state.put(i, j, now)


class _State:
    """A graph with its fit. Column k of `residual`: the errors of k are X residual[:, k]."""

    def __init__(self, directed, bidirected, covariance, num_rows, costs):
        self.directed, self.bidirected = np.array(directed, bool), np.array(bidirected, bool)
        self.covariance, self.rows, self.costs = np.asarray(covariance, np.float64), float(num_rows), np.asarray(costs)
        self.parents = [set(np.flatnonzero(column).tolist()) for column in self.directed.T]
        self.siblings = [set(np.flatnonzero(column).tolist()) for column in self.bidirected.T]
        self.residual, self.omega = np.eye(len(self.parents)), np.diag(np.diag(self.covariance))
        self.alone: dict[tuple, float] = {}
        self.terms = np.zeros(len(self.parents))  # of a district, at its least member
        for i in range(len(self.parents)):
            if i == min(self.district(i)):
                self.settle(self.district(i))

    def edges(self) -> tuple[Edges, Edges]:
        return self.directed.copy(), self.bidirected.copy()

    def score(self) -> float:
        edges = self.directed | self.directed.T | self.bidirected
        return float(self.terms.sum() + (self.costs * edges).sum() / 2)

    def kind(self, i, j) -> int:
        if self.bidirected[i, j]:
            return BOTH
        return FORTH if self.directed[i, j] else BACK if self.directed[j, i] else NOTHING

    def put(self, i, j, kind) -> None:
        self.directed[i, j], self.directed[j, i] = kind == FORTH, kind == BACK
        self.bidirected[i, j] = self.bidirected[j, i] = kind == BOTH
        for a, b, there in ((i, j, kind == FORTH), (j, i, kind == BACK)):
            self.parents[b].add(a) if there else self.parents[b].discard(a)
            self.siblings[b].add(a) if kind == BOTH else self.siblings[b].discard(a)

    def district(self, i) -> set[int]:
        found, new = {i}, [i]
        while new:
            more = self.siblings[new.pop()] - found
            found |= more
            new += more
        return found

    def around(self, i, j) -> set[int]:
        """The pair's districts: the same vertices with any edge on the pair."""
        return self.district(i) | self.district(j)

    def held(self, members) -> float:
        return self.terms[list(members)].sum()

    def tried(self, members, changed) -> float:
        """A bound of the score of the members, those fitted again whose edges changed."""
        if not any(self.siblings[i] for i in members):
            return sum(self.single(i) for i in members)
        return self.rows * _fitted(self, sorted(members), changed, 1)[0]

    def settle(self, members) -> None:
        """Fits the members and keeps the fit."""
        for i in members:
            self.terms[i] = 0.0
        for district in {frozenset(self.district(i)) for i in members}:
            if len(district) == 1:
                (i,) = district
                group = sorted(self.parents[i])
                self.residual[:, i] = np.eye(len(self.parents))[i]
                self.residual[group, i] = -_regressed(self.covariance, i, group)[0]
                self.omega[i], self.omega[:, i] = 0.0, 0.0
                self.omega[i, i] = _regressed(self.covariance, i, group)[1]
                self.terms[i] = self.single(i)
                continue
            inside = sorted(district)
            value, residual, omega = _fitted(self, inside, inside, SWEEPS)
            self.residual[:, inside], self.omega[np.ix_(inside, inside)] = residual, omega
            others = [k for k in range(len(self.parents)) if k not in district]
            self.omega[np.ix_(inside, others)], self.omega[np.ix_(others, inside)] = 0.0, 0.0
            self.terms[inside[0]] = self.rows * value

    def single(self, i) -> float:
        """n log of the variance that the parents leave, of a vertex without siblings."""
        key = (i, *sorted(self.parents[i]))
        if key not in self.alone:
            self.alone[key] = self.rows * float(np.log(_regressed(self.covariance, i, list(key[1:]))[1]))
        return self.alone[key]


def _fitted(state: _State, members, order, sweeps):
    """(log det Omega + tr(Omega^-1 R^T S R) - |D|, R, Omega) after conditional fitting of the vertices of `order`, from the state's fit."""
    used = sorted({*members, *itertools.chain(*(state.parents[i] for i in members))})
    place = {v: k for k, v in enumerate(used)}
    rows, columns, inside = np.array(used)[:, None], np.array(used), np.array(members)
    own, one = state.covariance[rows, columns], np.eye(len(used))
    siblings = state.bidirected[inside[:, None], inside]
    residual = state.residual[rows, inside]
    omega = state.omega[inside[:, None], inside] * (siblings | np.eye(len(members), dtype=bool))
    try:  # without an edge that went it need not be positive definite
        np.linalg.cholesky(omega)
    except np.linalg.LinAlgError:
        omega = np.diag(omega.diagonal())
    last = np.inf
    for _ in range(sweeps):
        for i in order:
            k, at = members.index(i), place[i]
            above = [place[v] for v in state.parents[i]]
            beside = siblings[k].nonzero()[0]
            cut = omega.copy()
            cut[k], cut[:, k], cut[k, k] = 0.0, 0.0, 1.0
            inverse = np.linalg.inv(cut)
            inverse[k, k] = 0.0  # of Omega without i
            design = np.concatenate([one[:, above], residual @ inverse[:, beside]], axis=1)
            moment = design.T @ own
            found = _solved(moment @ design, moment[:, at])
            shared = np.zeros(len(members))
            shared[beside] = found[len(above) :]
            left = one[at] - design @ found
            omega[k] = omega[:, k] = shared
            omega[k, k] = left @ own @ left + shared @ inverse @ shared
            residual[:, k] = one[at]
            residual[above, k] = -found[: len(above)]
        errors = residual.T @ own @ residual
        value = np.linalg.slogdet(omega)[1] + (np.linalg.inv(omega) * errors).sum() - len(members)
        if state.rows * (last - value) < CHANGE:
            break
        last = value
    whole = np.zeros((len(state.parents), len(members)))
    whole[used] = residual
    return float(value), whole, omega


def _regressed(covariance, i, group):
    """(coefficients of the group, variance that is left)."""
    if not group:
        return np.zeros(0), covariance[i, i]
    cross = covariance[group, i]
    found = _solved(covariance[np.ix_(group, group)], cross)
    return found, max(covariance[i, i] - cross @ found, 1e-9 * covariance[i, i])


def _solved(moment, target):
    return np.linalg.solve(moment + 1e-9 * np.diag(moment.diagonal()), target)
