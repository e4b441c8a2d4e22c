"""Marks at the ends of edges: how a graph with hidden causes is written down, in memory and in files.

`marks[i, j]` is the mark AT j on the edge between i and j, so that

    i -> j     marks[i, j] = ARROW    marks[j, i] = TAIL      i causes j
    i <-> j    marks[i, j] = ARROW    marks[j, i] = ARROW     neither causes the other: a hidden common cause
    i o-> j    marks[i, j] = ARROW    marks[j, i] = CIRCLE    j does not cause i; the data cannot tell more
    i o-o j    marks[i, j] = CIRCLE   marks[j, i] = CIRCLE

The numbers are those of pcalg. A matrix has either two marks or none on a pair, and none on the diagonal.
"""

from jaxtyping import Int8

from dmsec_jax.core.types import AnyArray

NONE, CIRCLE, ARROW, TAIL = 0, 1, 2, 3
Marks = Int8[AnyArray, "V V"]
