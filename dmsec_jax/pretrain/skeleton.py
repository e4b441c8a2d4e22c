"""Training of the skeleton posterior that ships: resumable, and checked on data sets that it has not seen."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from dmsec_jax import parallel
from dmsec_jax.causal import skeleton
from dmsec_jax.causal.sem import Prior
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.checkpoints.state import Checkpoints
from dmsec_jax.core import config, spread
from dmsec_jax.core.types import Params
from dmsec_jax.metrics import graph as metrics
from dmsec_jax.models import skeleton_net
from dmsec_jax.models.skeleton_net import EdgeMLP

OnChunk = Callable[[int, np.ndarray], None]
"""(updates done, loss of each since the last call)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What fixes a training; `configs/spot/skeleton.yaml` is that of the shipped one.

    chunk_steps: updates between two checkpoints.
    held_out: data sets of each size of `check_sizes`, for the calibration in the card.
    """

    prior: Prior = Prior()
    net: EdgeMLP = EdgeMLP()
    train: skeleton.Config = skeleton.Config()
    seed: int = 0
    chunk_steps: int = 100
    held_out: int = 128
    check_sizes: tuple[int, ...] = (10, 30, 60, 100)


def train(recipe: Recipe, folder: Path, on_chunk: OnChunk) -> Params:
    """The parameters after all updates; an interrupted training goes on from the newest checkpoint in `folder`.

    Raises:
        ValueError: if the checkpoint there is of another recipe.
        OSError: if a checkpoint cannot be written.
    """
    key = jax.random.key(recipe.seed)
    of_recipe = {"recipe": config.to_dict(recipe)}
    with Checkpoints(folder) as checkpoints:
        shapes = jax.eval_shape(lambda: skeleton.init(key, recipe.net, recipe.train))
        found = checkpoints.restore(spread.cut_shapes(shapes), metadata=of_recipe)

        def keep(done: int, state: skeleton.State, losses: np.ndarray) -> None:
            checkpoints.save(done, spread.to_host(state), of_recipe)
            on_chunk(done, losses)

        resume = None if found is None else (found.step, parallel.cut(found.tree))
        options = {"resume": resume, "on_chunk": keep, "chunk": recipe.chunk_steps}
        trained = skeleton.train(key, recipe.prior, recipe.net, recipe.train, **options)
        return parallel.to_host(trained.params)


def calibration(params: Params, recipe: Recipe) -> list[dict[str, float]]:
    """How well probabilities and frequencies agree on held-out data sets of the same prior, one entry for each size."""
    found = []
    for size in recipe.check_sizes:
        probability, adjacent = held_out(jax.random.key(recipe.seed + 1), params, recipe, size, recipe.held_out)
        entry = {
            "variables": size,
            "data_sets": recipe.held_out,
            "ece": metrics.expected_calibration_error(probability, adjacent),
            "sum_ratio": metrics.sum_ratio(probability, adjacent),
            "log_loss": metrics.log_loss(probability, adjacent),
            "auprc": metrics.auprc(probability, adjacent),
        }
        found.append(entry)
    return found


def held_out(key, params: Params, recipe: Recipe, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and skeletons [count, P] of simulated data sets, a few at a time."""
    together = min(count, skeleton.data_sets(size, recipe.train))
    first, second = np.triu_indices(size, 1)

    @jax.jit
    def some(key):
        phi, adjacent = skeleton.batch(key, size, together, recipe.prior, recipe.train.rows)
        logits = jax.vmap(lambda one: skeleton_net.apply(recipe.net, params, one)[first, second])(phi)
        return spread.whole((jax.nn.sigmoid(logits), adjacent))

    parts = [some(jax.random.fold_in(key, i)) for i in range(-(-count // together))]
    return tuple(np.concatenate([np.asarray(part[k]) for part in parts])[:count] for k in (0, 1))


def posterior(params: Params, recipe: Recipe) -> Posterior:
    """What ships: the parameters with recipe and measured calibration."""
    card = {"recipe": config.to_dict(recipe), "calibration": calibration(params, recipe)}
    return Posterior(params, recipe.net, card)
