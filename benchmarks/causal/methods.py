"""What this library finds in one data set: the posterior alone, and the search with every guide."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8

from dmsec_jax import discovery
from dmsec_jax.causal import features
from dmsec_jax.checkpoints.skeleton import Posterior
from dmsec_jax.core.types import Key
from dmsec_jax.methods import spot

Scale = Literal["raw", "standardised"]


def probabilities(posterior: Posterior, data: Float[np.ndarray, "N V"]) -> Float[np.ndarray, "V V"]:
    """Edge probabilities, the same for raw and standardised data."""
    corr = features.correlation(data)
    return np.array(discovery.linked(posterior.params, posterior.net, corr, float(len(data))))


def search(
    key: Key, probability: np.ndarray, data, guide: str, scale: Scale, family: discovery.Family, restarts: int
) -> Int8[np.ndarray, "V V"]:
    """Marks of the maximal ancestral graph of the lowest BIC of `restarts` starts."""
    cfg = spot.Config(guide=guide)
    covariance = np.cov(data, rowvar=False) if scale == "raw" else np.corrcoef(data, rowvar=False)
    covariance = discovery.regularised(covariance.astype(np.float32), len(data))
    guidance = spot.guide_dag(probability) if family == "dag" else spot.guide_mag(probability)
    guidance = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (restarts, *leaf.shape)), guidance)
    return np.asarray(_searched(key, covariance, jnp.float32(len(data)), guidance, cfg, family).marks)


@functools.partial(jax.jit, static_argnames="family")
def _searched(key, covariance, num_rows, guidance, cfg, family):
    class_fn, offending_fn = discovery.CLASSES[family]
    options = {"class_fn": class_fn, "offending_fn": offending_fn}
    return spot.search(key, covariance, num_rows, guidance, cfg, **options)[0]
