"""From a maximal ancestral graph to the partial ancestral graph: what all graphs with the same independences share.

Zhang, "On the completeness of orientation rules for causal discovery in the presence of latent confounders and selection bias", Artificial
Intelligence 2008: rules R0-R4 and R8-R10; without selection bias R5-R7 never apply. No test of independence is needed: where a rule asks for
one (the colliders of R0 and R4), the graph itself answers.

On the host, in NumPy: R1, R2 and R8 are products of matrices, R3 and the searches of R4, R9 and R10 go along edges.
"""

import numpy as np
from jaxtyping import Bool, Int8

from dmsec_jax.causal import graphs
from dmsec_jax.core.marks import ARROW, CIRCLE, NONE, TAIL


def of_mag(mag: Int8[np.ndarray, "V V"]) -> Int8[np.ndarray, "V V"]:
    """Marks of the partial ancestral graph of a maximal ancestral graph's Markov equivalence class.

    A mark that is the same in all graphs of the class is kept; where they differ stands a circle.

    Raises:
        ValueError: on marks that are no graph with directed and bidirected edges alone.
    """
    mag = graphs.check_marks("mag", mag, circles=False)
    marks = np.where(mag == NONE, NONE, CIRCLE).astype(np.int8)
    marks[_unshielded_heads(mag)] = ARROW  # R0
    before = None
    while before is None or (before != marks).any():
        before = marks.copy()
        _rules_1_2_3(marks)
        _rule_4(marks, mag)
    before = None  # no rule of tails makes an arrowhead that R1-R4 could go on from
    while before is None or (before != marks).any():
        before = marks.copy()
        _rule_8(marks)
        _rules_9_10(marks)
    return marks


def markov_equivalent(mag: Int8[np.ndarray, "V V"], other: Int8[np.ndarray, "V V"]) -> bool:
    """Whether two maximal ancestral graphs over the same variables imply the same independences: whether they share one partial graph."""
    return bool((of_mag(mag) == of_mag(other)).all())


def _unshielded_heads(mag) -> Bool[np.ndarray, "V V"]:
    """[a, b]: a *-> b, and some c *-> b that is not adjacent to a."""
    head = mag == ARROW
    return head & _any(_apart(mag), head)


def _apart(marks) -> Bool[np.ndarray, "V V"]:
    """Which two vertices are not adjacent."""
    return (marks == NONE) & ~np.eye(len(marks), dtype=bool)


def _any(a, b) -> Bool[np.ndarray, "V V"]:
    """Product of Boolean matrices."""
    return a.astype(np.float32) @ b.astype(np.float32) > 0


def _rules_1_2_3(marks) -> None:
    """Applied in place until none changes anything.

    R1   a *-> b o-* c, a and c apart                             =>  b -> c
    R2   a -> b *-> c or a *-> b -> c, a *-o c                    =>  a *-> c
    R3   a *-> b <-* c, a *-o t o-* c, a and c apart, t *-o b     =>  t *-> b
    """
    apart = _apart(marks)
    while True:
        before = marks.copy()
        head = marks == ARROW
        out = (marks.T == CIRCLE) & _any(head.T, apart)  # [b, c]
        marks[out], marks[out.T] = ARROW, TAIL
        head = marks == ARROW
        cause = head & (marks.T == TAIL)
        marks[(marks == CIRCLE) & (_any(cause, head) | _any(head, cause))] = ARROW
        for t, b in np.argwhere(marks == CIRCLE):
            sides = np.flatnonzero((marks[:, b] == ARROW) & (marks[:, t] == CIRCLE))
            if apart[np.ix_(sides, sides)].any():
                marks[t, b] = ARROW
        if (before == marks).all():
            return


def _rule_4(marks, mag) -> None:
    """Applied once, in place, to every pair.

    R4   <t, ..., a, b, c> discriminates for b, b o-* c           =>  b -> c if b is no collider there, else a <-> b <-> c
    """
    for c, b in np.argwhere(marks == CIRCLE).tolist():  # the circle at b
        a = _discriminating(marks, b, c) if marks[c, b] == CIRCLE else None
        if a is not None and mag[c, b] == TAIL:
            marks[c, b], marks[b, c] = TAIL, ARROW
        elif a is not None:
            marks[a, b] = marks[b, a] = marks[c, b] = marks[b, c] = ARROW


def _discriminating(marks, b: int, c: int) -> int | None:
    """The a of a path <t, ..., a, b, c> on which all between t and b are colliders and parents of c, t and c apart; None if there is none."""
    parent = (marks[:, c] == ARROW) & (marks[c] == TAIL)
    for a in np.flatnonzero(parent & (marks[b] == ARROW)).tolist():
        seen = np.zeros(len(marks), dtype=bool)
        seen[[a, b, c]] = True
        edge = [a]
        while edge:
            v = edge.pop()
            into = np.flatnonzero((marks[:, v] == ARROW) & ~seen)
            if (marks[into, c] == NONE).any():
                return a
            on = into[parent[into] & (marks[v, into] == ARROW)]
            seen[on] = True
            edge.extend(on)
    return None


def _rule_8(marks) -> None:
    """Applied in place. R8   a -> b -> c, a o-> c   =>  a -> c."""
    cause = (marks == ARROW) & (marks.T == TAIL)
    marks.T[(marks == ARROW) & (marks.T == CIRCLE) & _any(cause, cause)] = TAIL


def _rules_9_10(marks) -> None:
    """Applied in place to every a o-> c; a path is uncovered if no two of its vertices two apart are adjacent.

    R9    an uncovered potentially directed path a, b, ..., c; b and c apart                              =>  a -> c
    R10   b -> c <- d; such paths from a to b by m and from a to d by w; m and w differ and are apart     =>  a -> c
    """
    apart = _apart(marks)
    steps = ((marks == ARROW) | (marks == CIRCLE)) & ((marks.T == TAIL) | (marks.T == CIRCLE))  # may be i -> j
    for a, c in np.argwhere((marks == ARROW) & (marks.T == CIRCLE)).tolist():
        firsts = [m for m in np.flatnonzero(steps[a]).tolist() if m != c]
        reach = {m: _uncovered_reach(steps, apart, a, m) for m in firsts}
        parents = (marks[:, c] == ARROW) & (marks[c] == TAIL)
        by_9 = any(reach[m][c] for m in firsts if apart[m, c])
        if by_9 or any(
            _two_parents(parents, reach[m], reach[w]) for m in firsts for w in firsts if m < w and apart[m, w]
        ):
            marks[c, a] = TAIL


def _two_parents(parents, by_m, by_w) -> bool:
    """Whether two different parents can be reached, one by each way."""
    first, second = parents & by_m, parents & by_w
    return bool(first.any() and second.any() and (first | second).sum() > 1)


def _uncovered_reach(steps, apart, a: int, m: int) -> Bool[np.ndarray, "V"]:
    """What an uncovered potentially directed walk a, m, ... reaches, m included.

    Walks are as good as paths: in a graph of the class with an arrow at a, each edge of the walk would be directed along it, from a back into a.
    """
    reached = np.zeros(len(steps), dtype=bool)
    reached[m] = True
    seen, edge = {(a, m)}, [(a, m)]
    while edge:
        u, v = edge.pop()
        for w in np.flatnonzero(steps[v] & apart[u]).tolist():
            if (v, w) not in seen:
                seen.add((v, w))
                edge.append((v, w))
                reached[w] = True
    return reached
