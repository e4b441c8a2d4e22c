"""The skeleton posterior as a guide of gradient descent: an optax transformation, to stand last in a chain.

A coefficient may always move towards zero; it may move away only with the probability that the guide gives to its edge. All numbers of one edge
(a matrix entry, or a group of a network's weights) move together. The guide masks updates, not gradients: Adam divides a masked gradient by its
own root mean square and averages over the gaps, so that hardly anything of the mask is left (`test_adam_forgets_masked_gradients`).

    off     no mask
    spot    (0.1 + P)^(1 / (t + 2)) at outer iteration t: the paper's, which fades as t grows
    prob    P itself, for posteriors that are calibrated
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from dmsec_jax.core.types import AnyArray, Key

Mode = Literal["off", "spot", "prob"]


def growth(probability: Float[AnyArray, "*S"], iteration: int | Int[AnyArray, ""], mode: Mode) -> Float[Array, "*S"]:
    """Probability that a coefficient may move away from zero."""
    if mode == "off":
        return jnp.ones_like(probability)
    if mode == "prob":
        return jnp.asarray(probability)
    return jnp.minimum(0.1 + probability, 1.0) ** (1.0 / (iteration + 2))


def guided(probability: PyTree, mode: Mode) -> optax.GradientTransformationExtraArgs:
    """The mask; `update` takes `key` and `iteration` besides.

    Args:
        probability: a tree like the parameters. An entry may have fewer axes than its parameter: the trailing ones are then an edge's group.
    """
    if mode == "off":  # draws nothing
        return optax.with_extra_args_support(optax.identity())

    def update(updates, state, params, *, key: Key, iteration, **_):
        leaves, tree = jax.tree.flatten(updates)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))

        def masked(update, param, edge, own):
            axes = tuple(range(edge.ndim, update.ndim))
            towards = (update * param).sum(axis=axes) < 0
            grows = jax.random.uniform(own, edge.shape) < growth(edge, iteration, mode)
            return jnp.where((towards | grows).reshape(edge.shape + (1,) * len(axes)), update, 0.0)

        return jax.tree.map(masked, updates, params, probability, keys), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def log_odds_weights(probability: Float[AnyArray, "V V"]) -> Float[Array, "V V"]:
    """What an edge costs relative to one of even odds e: log((1 - P) / P), within [0.25, 8].

    The prior's share of a maximum a posteriori score, if P were a prior; it has seen the same data, so this is guidance, not Bayes' rule.
    """
    p = jnp.asarray(probability)
    return jnp.clip(jnp.log((1 - p + 1e-4) / (p + 1e-4)), 0.25, 8.0)
