"""A trained skeleton posterior as a folder: `posterior.safetensors` and `card.json`, which says how it was trained and how well it is calibrated."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmsec_jax.checkpoints import io
from dmsec_jax.core import trees
from dmsec_jax.core.checks import require
from dmsec_jax.core.config import from_dict, to_dict
from dmsec_jax.core.files import read_json, write_json
from dmsec_jax.core.types import Params
from dmsec_jax.models.skeleton_net import EdgeMLP, EdgeTransformer, SkeletonConfig

WEIGHTS, CARD = "posterior.safetensors", "card.json"
KINDS = {"EdgeMLP": EdgeMLP, "EdgeTransformer": EdgeTransformer}


class Posterior(NamedTuple):
    """Parameters and the network that they are of; `card` is anything that JSON holds."""

    params: Params
    net: SkeletonConfig
    card: dict[str, Any]


def write(folder: str | Path, posterior: Posterior) -> None:
    """Writes both files, the weights in float32.

    Raises:
        OSError: if one cannot be written.
    """
    tensors = {path: np.asarray(leaf) for path, leaf in trees.flatten(posterior.params).items()}
    io.write_tensors(Path(folder) / WEIGHTS, tensors, dtype="float32")
    net = {"kind": type(posterior.net).__name__, **to_dict(posterior.net)}
    write_json(Path(folder) / CARD, {**posterior.card, "net": net})


def read(folder: str | Path) -> Posterior:
    """Reads what `write` wrote.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is not what it should be, or the network is of an unknown kind.
    """
    card = read_json(Path(folder) / CARD)
    net = dict(card.get("net") or {})
    kind = net.pop("kind", None)
    known = ", ".join(KINDS)
    require(kind in KINDS, f"net.kind of {folder}", f"one of {known}", repr(kind), "check that it is the right folder")
    params = trees.unflatten(io.read_tensors(Path(folder) / WEIGHTS))
    return Posterior(params, from_dict(KINDS[kind], net, f"net of {folder}"), card)
