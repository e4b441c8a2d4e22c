"""What pictures are judged by: features that need no weights, or the networks in the user's own files.

None of CLIP, DINO and SSCD comes with this package; where one is not given its substitute says what it is.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from dmsec_jax.checkpoints import feature_networks, torch_archive
from dmsec_jax.core.checks import require
from dmsec_jax.core.files import sha256
from dmsec_jax.core.types import AnyArray
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.metrics import perception, similarity
from dmsec_jax.metrics.similarity import Embed, EmbedFn
from dmsec_jax.models import clip_pair, features, sscd, vit

LAYERS = {"dino": 1, "dino-last-4": vit.LAST}
NAMES = ("hog", "sscd", "clip", *LAYERS)
LPIPS = "LPIPS with a shift-tolerant AlexNet"
LARGEST = 256
"""Side of a picture that LPIPS is measured at, at most: memory grows with its square."""


class Features(NamedTuple):
    """What decides whether two pictures are alike."""

    label: str
    """For the report: what a similarity is the similarity of."""
    embed: Embed
    inputs: dict[str, str]
    """Label -> SHA-256 of the files it was made from."""


@functools.cache  # one reading and one compilation, however often it is asked for
def features_of(
    name: str = "hog",
    sscd_file: Path | None = None,
    preprocessing: str = "sscd-288-imagenet",
    weights: Path | None = None,
) -> Features:
    """Oriented gradients ("hog"), or a network in the user's own files: "sscd" with a preprocessing of `sscd.PREPROCESSINGS`, CLIP's image
    tower ("clip"), DINO's last class token ("dino") or its last four side by side ("dino-last-4").

    Args:
        sscd_file: of SSCD.
        weights: of the others; see `feature_networks.read_clip` and `read_dino`.

    Raises:
        ValueError: on unknown names, a network without its file, a file without its network, or one that holds another network.
        OSError: if it cannot be opened.
    """
    require(name in NAMES, "features", f"one of {', '.join(NAMES)}", repr(name), "choose one of them")
    alone = name == "sscd" or sscd_file is None
    require(alone, "sscd_file", "given only for the features sscd", sscd_file, "set features to sscd")
    known = name == "clip" or name in LAYERS
    require(known or weights is None, "weights", "given only for clip and dino", weights, "set features to one of them")
    if name == "hog":
        return Features(similarity.HOG, similarity.embed, {})
    if name == "sscd":
        return _sscd(sscd_file, preprocessing)
    cure = "name the folder of a transformers model, for example a copy of openai/clip-vit-large-patch14"
    require(weights is not None, "weights", f"given for the features {name}", weights, cure)
    if name == "clip":
        return _features("CLIP", weights, _clip_fn(weights))
    cfg, params = feature_networks.read_dino(weights)
    last = LAYERS[name]
    fn = Partial(functools.partial(vit.dino_features, cfg, last=last), _on_device(params))
    return _features(f"DINO, {'last class token' if last == 1 else f'last {last} class tokens'}", weights, fn)


def _sscd(sscd_file: Path | None, preprocessing: str) -> Features:
    cure = "name the TorchScript file of its weights, for example sscd_disc_mixup.torchscript.pt"
    require(sscd_file is not None, "sscd_file", "given for the features sscd", sscd_file, cure)
    known = sscd.PREPROCESSINGS
    right = preprocessing in known
    require(right, "preprocessing", f"one of {', '.join(known)}", repr(preprocessing), "choose one of them")
    tensors = torch_archive.read(sscd_file)
    cfg, params = sscd.convert({key: value for key, value in tensors.items() if not key.startswith("constants.")})
    embed_fn = Partial(functools.partial(sscd.embed, cfg, preprocessing=preprocessing), _on_device(params))
    label = f"SSCD ({sscd_file.name}, {preprocessing}), centred on the style"
    return Features(label, functools.partial(similarity.embed, embed_fn=embed_fn), {"SSCD": sha256(sscd_file)})


def _features(label: str, weights: Path, fn: EmbedFn) -> Features:
    embed = functools.partial(similarity.embed, embed_fn=fn)
    return Features(f"{label} ({weights.name}), centred on the style", embed, {label: sha256(weights)})


@functools.cache
def _clip(folder: Path):
    cfg, params = feature_networks.read_clip(folder)
    return cfg, _on_device(params)


@functools.cache
def _clip_fn(folder: Path) -> EmbedFn:
    cfg, params = _clip(folder)
    return Partial(functools.partial(clip_pair.image_features, cfg), params)


def _on_device(params):
    return jax.tree.map(jnp.asarray, params)


class Texts(NamedTuple):
    """Of CLIP's text tower, unit length."""

    antonyms: Float[np.ndarray, "2 D"]
    prompt: Float[np.ndarray, "1 D"]


def clip_texts(folder: Path, prompt: str) -> Texts:
    """What pictures are compared with for CLIP-IQA and CLIP-T, by the model and the tokenizer in `folder`.

    Raises:
        ValueError: on what `read_clip` and `Tokenizer.load` refuse, or a prompt that is too long.
    """
    cfg, params = _clip(folder)
    ids = Tokenizer.load(folder).encode([*perception.ANTONYMS, prompt])
    found = np.asarray(_texts(cfg, params, ids))
    return Texts(found[:2], found[2:])


_texts = jax.jit(clip_pair.text_features, static_argnums=0)


def perceptual_distances(images: Float[AnyArray, "N H W 3"]) -> Float[np.ndarray, "N N"]:
    """`LPIPS` of all pairs of pictures in [-1, 1], at 32 to `LARGEST` pixels: smaller and larger ones are resized."""
    images = jnp.asarray(images)
    n, height, width, _ = images.shape
    short = min(height, width)
    side = min(max(short, features.MIN_SIDE), LARGEST)
    if side != short:
        size = (n, height * side // short, width * side // short, 3)
        images = jnp.clip(jax.image.resize(images, size, "cubic"), -1, 1)
    cfg, params = _alexnet()
    rows = [_perceptual(cfg, params, images[i : i + similarity.BATCH]) for i in range(0, n, similarity.BATCH)]
    return perception.squared_distances(np.concatenate(rows))


@functools.cache
def _alexnet():
    cfg, params = features.load()
    return cfg, _on_device(params)


_perceptual = jax.jit(features.perceptual, static_argnums=0)
