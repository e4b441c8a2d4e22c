"""Words that textual inversion taught: vectors for the text encoders' tables, in the layouts that people share.

    diffusers      {"<cat-toy>": [D] or [n, D]}, `learned_embeds.safetensors` or `.bin`
    A1111          {"string_to_param": {"*": [n, D]}, ...}, `.pt`; or {"emb_params": [n, D]}, `.safetensors`
    SDXL pairs     {"clip_l": [n, 768], "clip_g": [n, 1280]}: the same word for both text encoders

The first names its words; in the others the file's name is the word, as in A1111.
Source: Gal et al., "An Image is Worth One Word", 2023.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmsec_jax.checkpoints.adapters import read_state
from dmsec_jax.core.checks import fail, require

PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
A1111 = ("string_to_param.*", "string_to_param._parameters.*", "emb_params")
BESIDES = ("string_to_token.*", "string_to_token._parameters.*")
MAX_VECTORS = 75
"""A word of more would not fit the context of CLIP."""
CURE = "name a textual-inversion file for this base model"


class Word(NamedTuple):
    """A word and its vectors: part ("text_encoder", "text_encoder_2") -> [n, D] float32, n the same for all parts."""

    word: str
    vectors: Mapping[str, np.ndarray]


def read_words(path: str | Path, widths: Mapping[str, int]) -> tuple[Word, ...]:
    """The words of a file.

    Args:
        path: .safetensors, or a PyTorch file, in which nothing is executed.
        widths: part -> width of its table, for every text encoder of the model.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: on a damaged file, one of another kind or for another family, or vectors that are not finite.
    """
    path = Path(path)
    state, _ = read_state(path)
    state = {key: tensor for key, tensor in state.items() if key not in BESIDES}
    words = tuple(_words(state, path.stem, widths, str(path)))
    require(len(words) > 0, str(path), "made of words and their vectors", "nothing", CURE)
    for word in words:
        _check(word, widths, str(path))
    return words


def is_words(state: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors of these names and shapes can be learnt words."""
    named = {key for key in state if key in (*PAIR, *A1111)}
    vectors = all(t.ndim in (1, 2) and t.dtype.kind in "fV" and "." not in key for key, t in state.items())
    return bool(named) or (0 < len(state) <= MAX_VECTORS and vectors)


def _words(state: Mapping[str, np.ndarray], stem: str, widths: Mapping[str, int], name: str):
    if state.keys() == PAIR.keys():
        yield Word(stem, {PAIR[key]: _matrix(tensor, key, name) for key, tensor in state.items()})
        return
    if len(widths) > 1:
        raise fail(name, f"made of {' and '.join(PAIR)}, for both text encoders", ", ".join(list(state)[:5]), CURE)
    (part,) = widths
    for key, tensor in state.items():
        yield Word(stem if key in A1111 else key, {part: _matrix(tensor, key, name)})


def _matrix(tensor: np.ndarray, key: str, name: str) -> np.ndarray:
    fits = tensor.ndim in (1, 2) and tensor.size > 0 and tensor.dtype.kind in "fV"
    require(fits, f"{key[:100]} of {name}", "vectors [n, D]", f"{tensor.dtype} {list(tensor.shape)}", CURE)
    return np.array(np.atleast_2d(tensor), np.float32)


def _check(word: Word, widths: Mapping[str, int], name: str) -> None:
    what = f"{word.word[:100]!r} of {name}"
    require(word.word.strip() == word.word != "", what, "a word", repr(word.word[:100]), "rename the file")
    counts = {len(vectors) for vectors in word.vectors.values()}
    require(len(counts) == 1 and max(counts) <= MAX_VECTORS, what, f"of at most {MAX_VECTORS} vectors", counts, CURE)
    for part, vectors in word.vectors.items():
        right = vectors.shape[1] == widths[part]
        require(right, what, f"of width {widths[part]}, the {part}'s", vectors.shape[1], CURE)
        require(bool(np.isfinite(vectors).all()), what, "finite", "NaN or infinity", CURE)
