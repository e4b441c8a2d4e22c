"""What is trained: an `Adapter` turns a base parameter tree into a trainable tree, and the two back into the parameters
that a network takes.

Everything downstream (objective, optimiser, EMA, Bayesian posterior, export) works on the trainable tree and never asks
which adapter made it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.types import Key, Params

Scale = float | Float[Array, ""] | None


class Adapter(NamedTuple):
    """A pair of pure functions.

    init: `(key, base) -> trainable`, a nested dict of float32 arrays that share no buffer with `base`.
    merge: `(base, trainable, scale=None) -> params`, a tree like `base`. `scale` (a traced scalar; None means 1,
        exactly) multiplies what training changed: 0 gives the base model back, values above 1 extrapolate beyond the
        tuned one. Map over it (`jax.vmap` with `in_axes=(None, None, 0)`) for one set of parameters per row.
    """

    init: Callable[[Key, Params], Params]
    merge: Callable[..., Params]


def full(patterns: Sequence[str] | None = None) -> Adapter:
    """Trains the weights themselves: every leaf, or the leaves whose path any of the regular expressions finds
    (`core.trees.match`).

    `merge` with a scale is `base + scale * (trainable - base)`.

    Raises:
        ValueError: from `init`, if a pattern finds no path; from `merge`, if the trainable tree holds a path or shape
            that `base` lacks.
    """

    def init(key: Key, base: Params) -> Params:
        del key  # nothing random: training starts at the base weights
        flat = trees.flatten(base)
        chosen = flat if patterns is None else trees.match(flat, patterns)
        return trees.unflatten({path: jnp.array(flat[path], jnp.float32) for path in chosen})

    def merge(base: Params, trainable: Params, scale: Scale = None) -> Params:
        flat = trees.flatten(base)
        tuned = trees.flatten(trainable)
        for path, leaf in tuned.items():
            got = f"{path} of shape {leaf.shape}"
            cure = "merge with the base tree that init was given"
            require(path in flat and flat[path].shape == leaf.shape, "trainable", "a part of the base tree", got, cure)
        if scale is not None:
            tuned = {path: flat[path] + scale * (leaf - flat[path]) for path, leaf in tuned.items()}
        return trees.unflatten({**flat, **tuned})

    return Adapter(init, merge)


def count(adapter: Adapter, base: Params) -> int:
    """Number of trainable scalars, without allocating them; `base` may hold arrays or `jax.eval_shape` results."""
    return trees.count(jax.eval_shape(adapter.init, jax.random.key(0), base))
