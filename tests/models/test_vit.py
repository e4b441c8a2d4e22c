"""Vision transformers without PyTorch: published sizes, what the class token sees, preprocessing."""

import dataclasses

import jax
import numpy as np
import pytest

from dmsec_jax.core import trees
from dmsec_jax.models import clip, clip_pair, preprocessing, presets, vit

TINY = vit.VisionConfig(
    hidden_size=8,
    intermediate_size=16,
    projection_dim=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=14,
    patch_size=7,
)
apply = jax.jit(vit.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params(weights):
    return weights(vit.init, TINY)


def pictures(count=2, side=14, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def size(init, at):
    """Parameters of a network of `layers` layers, from those of one and of two: every layer adds as many."""
    layers, of = at
    one, two = (trees.count(jax.eval_shape(lambda n=n: init(jax.random.key(0), of(n)))) for n in (1, 2))
    return one + (layers - 1) * (two - one)


def test_networks_have_the_published_sizes():
    tower = lambda cfg: (cfg.num_hidden_layers, lambda n: dataclasses.replace(cfg, num_hidden_layers=n))
    assert size(vit.init, tower(vit.DINO_S16)) == 21_665_664
    image, text = vit.VisionConfig(), clip.TextConfig()  # ViT-L/14, whose projections and scale belong to neither
    parts = [size(vit.init, tower(image)), size(clip.init, tower(text))]
    assert sum(parts) + 768 * 1024 + 768 * 768 + 1 == 427_616_513


def test_the_class_token_sees_every_patch_and_where_it_is(params):
    x = pictures()
    found = apply(TINY, params, x)
    assert (found.last_hidden.shape, found.classes.shape) == ((2, 5, 8), (2, 2, 8))
    for row, column in ((0, 0), (0, 7), (7, 0), (7, 7)):
        changed = x.copy()
        changed[0, row : row + 7, column : column + 7] *= -1
        other = apply(TINY, params, changed)
        assert np.abs(other.classes[0] - found.classes[0]).max(axis=-1).min() > 1e-4
        np.testing.assert_allclose(other.classes[1], found.classes[1], atol=1e-6)
    swapped = apply(TINY, params, x[:, :, [*range(7, 14), *range(7)]])
    assert np.abs(swapped.classes - found.classes).max() > 1e-3


def test_dino_features_are_the_last_class_tokens(params):
    """Of a picture that preprocessing leaves as it is but for its scale: one of 16 pixels, cropped to 14."""
    x = pictures(side=16)
    classes = apply(TINY, params, preprocessing.preprocess(x, vit.dino_preprocessing(TINY))).classes
    embed = jax.jit(vit.dino_features, static_argnums=0, static_argnames="last")
    for last in (1, 2):
        joined = np.asarray(classes[:, -last:]).reshape(2, -1)
        expected = joined / np.linalg.norm(joined, axis=1, keepdims=True)
        np.testing.assert_allclose(embed(TINY, params, x, last=last), expected, atol=1e-5)


def test_clip_features_have_unit_length_in_one_space(weights):
    cfg = clip_pair.ClipConfig(text=presets.TINY.text, vision=TINY, projection_dim=6)
    params = weights(clip_pair.init, cfg)
    image = jax.jit(clip_pair.image_features, static_argnums=0)(cfg, params, pictures(side=20))
    ids = np.array([[598, 5, 599], [598, 9, 599]], np.int32)
    text = jax.jit(clip_pair.text_features, static_argnums=0)(cfg, params, ids)
    assert image.shape == text.shape == (2, 6)
    np.testing.assert_allclose(np.linalg.norm([image, text], axis=-1), 1, rtol=1e-5)


def test_preprocessed_sizes_and_scale():
    how = vit.clip_preprocessing(dataclasses.replace(TINY, image_size=28))
    white = preprocessing.preprocess(np.ones((1, 64, 96, 3), np.float32), how)
    assert white.shape == (1, 28, 28, 3)
    np.testing.assert_allclose(white[0, 3, 4], (1 - np.array(how.mean)) / how.std, rtol=1e-5)
    dino = vit.dino_preprocessing(vit.DINO_S16)
    assert (dino.resize, dino.crop) == (256, 224)


@pytest.mark.parametrize(("changes", "message"), [
    ({"image_size": 15}, "image_size must be a multiple of patch_size=7, got 15"),
    ({"num_attention_heads": 3}, "hidden_size must be a multiple"),
    ({"hidden_act": "relu"}, "hidden_act must be one of"),
])  # fmt: skip
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        vit.init(jax.random.key(0), dataclasses.replace(TINY, **changes))


def test_input_of_another_size_is_refused(params):
    with pytest.raises(ValueError, match=r"x must be \[B, 14, 14, 3\]"):
        vit.apply(TINY, params, pictures(side=16))
