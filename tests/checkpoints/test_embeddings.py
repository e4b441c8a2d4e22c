"""Words of textual inversion: every layout, and what must be refused."""

import numpy as np
import pytest

from dmsec_jax.checkpoints.embeddings import read_words
from dmsec_jax.checkpoints.io import write_tensors

ONE, TWO = {"text_encoder": 8}, {"text_encoder": 8, "text_encoder_2": 12}
draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)


def written(tmp_path, state, name="<cat>.safetensors"):
    write_tensors(tmp_path / name, state)
    return tmp_path / name


@pytest.mark.parametrize(("state", "word", "count"), [
    ({"<toy>": draw(8)}, "<toy>", 1),
    ({"<toy>": draw(3, 8)}, "<toy>", 3),
    ({"emb_params": draw(2, 8).astype(np.float16)}, "<cat>", 2),
])  # fmt: skip
def test_layouts_of_one_text_encoder(tmp_path, state, word, count):
    (found,) = read_words(written(tmp_path, state), ONE)
    assert found.word == word
    assert found.vectors["text_encoder"].shape == (count, 8)
    (tensor,) = state.values()
    np.testing.assert_array_equal(found.vectors["text_encoder"], np.atleast_2d(tensor).astype(np.float32))


def test_pairs_for_two_text_encoders(tmp_path):
    (found,) = read_words(written(tmp_path, {"clip_l": draw(2, 8), "clip_g": draw(2, 12)}), TWO)
    assert {part: vectors.shape for part, vectors in found.vectors.items()} == {
        "text_encoder": (2, 8),
        "text_encoder_2": (2, 12),
    }


@pytest.mark.parametrize(("state", "widths", "message"), [
    ({"<toy>": draw(9)}, ONE, "of width 8, the text_encoder's, got 9"),
    ({"<toy>": draw(2, 2, 8)}, ONE, r"must be vectors \[n, D\]"),
    ({"<toy>": draw(76, 8)}, ONE, "at most 75 vectors"),
    ({"<toy>": np.full(8, np.nan, np.float32)}, ONE, "must be finite"),
    ({"<toy>": np.arange(8)}, ONE, "int64"),
    ({" ": draw(8)}, ONE, "must be a word"),
    ({}, ONE, "got nothing"),
    ({"<toy>": draw(8)}, TWO, "clip_l and clip_g"),
    ({"clip_l": draw(2, 8), "clip_g": draw(3, 12)}, TWO, "of at most 75 vectors"),
])  # fmt: skip
def test_what_is_refused(tmp_path, state, widths, message):
    with pytest.raises(ValueError, match=message):
        read_words(written(tmp_path, state), widths)
