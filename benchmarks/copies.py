"""The pictures of `benchmarks.similarity` and their degraded copies."""

import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import degradations
from dmsec_jax import pipeline
from dmsec_jax.commands.demo import PICTURES
from dmsec_jax.data import images

PIXELS = 64
STRENGTHS = {"mild": degradations.MILD, "strong": degradations.STRONG}


class Queries(NamedTuple):
    """Degraded pictures [Q, ...], the rows of their original and of the picture that lent a part (-1: none), and what was done to them."""

    images: np.ndarray
    source: np.ndarray
    lender: np.ndarray
    kind: np.ndarray
    strength: np.ndarray


def read_sets(photos: Path | None) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Set -> its groups of pictures of one style or subject, [N, 64, 64, 3] each, and notes on what is not there."""
    read = lambda *folders: np.concatenate([images.read_folder(folder, PIXELS).images for folder in folders])
    sets = {"openmoji": [read(PICTURES / "member", PICTURES / "holdout")]}
    if photos is None:
        return sets, ["no --photos folder: paintings and photographs left out"]
    gogh = photos / "wikiart-van-gogh"
    sets["van-gogh"] = [read(gogh / "member", gogh / "holdout")]
    sets["monet"] = [read(photos / "wikiart-monet")]
    sets["subjects"] = [read(folder) for folder in sorted((photos / "dreambooth").iterdir())]
    return sets, []


def degrade(
    sets: dict[str, list[np.ndarray]], repeats: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Queries]:
    """All pictures [N, ...], their set and group, and all queries."""
    model = pipeline.load()
    trip = jax.jit(lambda params, *given: _round_trip(model.functions, params, *given))
    owned = [(name, group) for name, members in sets.items() for group in members]
    pictures = np.concatenate([group for _, group in owned])
    names = np.concatenate([np.repeat(name, len(group)) for name, group in owned])
    groups = np.concatenate([np.repeat(g, len(group)) for g, (_, group) in enumerate(owned)])
    rows = []
    for i, (s, (strength, kinds)) in itertools.product(range(len(pictures)), enumerate(STRENGTHS.items())):
        others = np.flatnonzero((groups == groups[i]) & (np.arange(len(groups)) != i))
        for (k, kind), repeat in itertools.product(enumerate([*kinds, "autoencoder"]), range(repeats)):
            rng = np.random.default_rng([seed, i, s, k, repeat])
            other = rng.choice(others)
            if kind == "autoencoder":
                changed = trip(
                    model.params["vae"], pictures[i][None], jax.random.key(int(rng.integers(2**31))), 0.5 * s
                )[0]
            else:
                changed = kinds[kind](rng, pictures[i], pictures[other])
            lender = other if kind in degradations.TAKES_OTHER else -1
            rows.append((np.asarray(changed, np.float32), i, lender, kind, strength))
    return pictures, names, groups, Queries(*(np.array(column) for column in zip(*rows, strict=True)))


def _round_trip(functions, params, picture, key, level):
    """Encoded, disturbed by `level` standard deviations of the latents, decoded."""
    latent, _ = functions.encode_fn(params, picture)
    return functions.decode_fn(params, latent + level * latent.std() * jax.random.normal(key, latent.shape))
