"""A trained skeleton posterior as a folder: `posterior.safetensors` and `card.json`, which says how it was trained and how well it is calibrated."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dmsec_jax.checkpoints import io
from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import from_dict, to_dict
from dmsec_jax.core.files import atomic_folder, read_json, write_json
from dmsec_jax.core.types import Params
from dmsec_jax.models import skeleton_net
from dmsec_jax.models.skeleton_net import EdgeMLP, EdgeTransformer, SkeletonConfig

WEIGHTS, CARD = "posterior.safetensors", "card.json"
KINDS = {"EdgeMLP": EdgeMLP, "EdgeTransformer": EdgeTransformer}


class Posterior(NamedTuple):
    """Parameters and the network that they are of; `card` is anything that JSON holds."""

    params: Params
    net: SkeletonConfig
    card: dict[str, Any]


def write(folder: str | Path, posterior: Posterior) -> None:
    """Writes both files or none, the weights in float32.

    Raises:
        ValueError: if `folder` is something else than a posterior.
        OSError: if one cannot be written.
    """
    tensors = {path: np.asarray(leaf) for path, leaf in trees.flatten(posterior.params).items()}
    net = {"kind": type(posterior.net).__name__, **to_dict(posterior.net)}
    with atomic_folder(folder, CARD) as part:
        io.write_tensors(part / WEIGHTS, tensors, dtype="float32")
        write_json(part / CARD, {**posterior.card, "net": net})


def read(folder: str | Path, num_features: int) -> Posterior:
    """Reads what `write` wrote.

    Args:
        num_features: that the network takes of each pair, `causal.features.COUNT`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is not what it should be, the network is of an unknown kind, or the weights are not those of the network.
    """
    card = read_json(Path(folder) / CARD)
    net = dict(card.get("net") or {})
    kind = net.pop("kind", None)
    known = ", ".join(KINDS)
    require(kind in KINDS, f"net.kind of {folder}", f"one of {known}", repr(kind), "check that it is the right folder")
    cfg = from_dict(KINDS[kind], net, f"net of {folder}")
    tensors = io.read_tensors(Path(folder) / WEIGHTS)
    wanted = jax.eval_shape(lambda key: skeleton_net.init(key, cfg, num_features), jax.random.key(0))
    forms = [
        {path: (leaf.shape, leaf.dtype) for path, leaf in tree.items()} for tree in (tensors, trees.flatten(wanted))
    ]
    others = sorted(path for path in forms[0].keys() | forms[1].keys() if forms[0].get(path) != forms[1].get(path))
    cure = "take both files from one training, or train again"
    require(
        not others,
        f"{WEIGHTS} of {folder}",
        f"the weights that {CARD} describes",
        f"others: {', '.join(others)}"[:300],
        cure,
    )
    return Posterior(trees.unflatten(tensors), cfg, card)
