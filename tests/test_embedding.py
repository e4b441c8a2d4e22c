"""Networks of the user's files as features, on tiny random ones; the embedded perceptual distance."""

import json

import jax
import numpy as np
import pytest

from dmsec_jax import embedding, monitoring
from dmsec_jax.checkpoints import feature_networks, mapping
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core import trees
from dmsec_jax.data.tokens import Tokenizer
from dmsec_jax.finetune import monitor
from dmsec_jax.metrics import perception
from dmsec_jax.models import clip_pair, features, vit

LAYERS = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def random_tree(init, cfg):
    rng = np.random.default_rng(0)
    target = jax.eval_shape(lambda key: init(key, cfg), jax.random.key(0))
    return trees.map_paths(lambda path, leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), target)


def pictures(count=3, side=40, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    words = Tokenizer.train(["good photo", "a red dog"], vocab_size=520, max_length=16)
    words.save(place)
    marks = {"bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id}
    text = LAYERS | marks | {"vocab_size": len(words.vocab), "max_position_embeddings": 16, "projection_dim": 6}
    vision = LAYERS | {"image_size": 8, "patch_size": 4, "projection_dim": 6}
    values = {"model_type": "clip", "projection_dim": 6, "text_config": text, "vision_config": vision}
    (place / "config.json").write_text(json.dumps(values))
    cfg = clip_pair.ClipConfig(
        text=clip_pair.TextConfig(**text), vision=clip_pair.VisionConfig(**vision), projection_dim=6
    )
    write_tensors(
        place / "model.safetensors", mapping.to_state(random_tree(clip_pair.init, cfg), feature_networks.CLIP_RULES)
    )
    return place


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("dino")
    values = LAYERS | {"image_size": 14, "patch_size": 7}
    (place / "config.json").write_text(json.dumps(values | {"model_type": "vit"}))
    cfg = vit.VisionConfig(**values, hidden_act="gelu", layer_norm_eps=1e-12, first_norm=False, patch_bias=True)
    write_tensors(
        place / "model.safetensors", mapping.to_state(random_tree(vit.init, cfg), feature_networks.DINO_RULES)
    )
    return place


def test_the_monitor_asks_clip_once_per_sample_and_says_so(clip_folder, monkeypatch):
    sight = monitoring.Sight(features="clip", feature_weights=clip_folder, clip=clip_folder)
    sight.check("a red dog")
    assert "fidelity by CLIP (" in sight.notes[0]
    assert "CLIP-IQA with the vision transformer" in sight.notes[0]
    training, before, samples = pictures(4), pictures(3, seed=1), pictures(3, seed=2)
    asked = []
    embed = sight.seen.embed
    monkeypatch.setattr(embedding.Features, "embed", property(lambda self: lambda x: asked.append(len(x)) or embed(x)))
    monitor.reference(training, before, sight.seen.embed)
    rows, scores = monitoring.seen_by(sight, "a red dog", samples)
    assert asked == [4, 3, 3]
    texts = embedding.clip_texts(clip_folder, "a red dog")
    assert texts.antonyms.shape == (2, 6)
    np.testing.assert_allclose(scores.quality, perception.quality(rows, texts.antonyms).mean())
    np.testing.assert_allclose(scores.alignment, (rows @ texts.prompt[0]).mean(), rtol=1e-5)
    np.testing.assert_allclose(scores.diversity, perception.diversity(embedding.perceptual_distances(samples)))


def test_layers_of_dino_are_joined(dino_folder):
    one = embedding.features_of("dino", weights=dino_folder)
    several = embedding.features_of("dino-last-4", weights=dino_folder)  # of two layers: both
    x = pictures()
    a, b = one.embed(x), several.embed(x)
    assert (a.shape, b.shape) == ((3, 8), (3, 16))
    last = b[:, 8:] / np.linalg.norm(b[:, 8:], axis=1, keepdims=True)
    np.testing.assert_allclose(last, a, atol=1e-5)
    assert one.label == f"DINO, last class token ({dino_folder.name}), centred on the style"


def test_without_networks_the_substitutes_are_named():
    (note,) = monitoring.Sight().notes
    assert "fidelity by oriented gradients" in note
    assert "in place of CLIP-IQA: no CLIP was given" in note


def test_small_pictures_are_enlarged_for_the_perceptual_distance(monkeypatch):
    cfg = features.FeaturesConfig(widths=(2, 3, 4, 3, 2))
    params = random_tree(features.init, cfg)
    params = trees.map_paths(lambda path, leaf: np.abs(leaf) if path.startswith("lin") else leaf, params)
    monkeypatch.setattr(embedding, "_alexnet", lambda: (cfg, params))
    x = pictures(3, side=16)
    x[2] = x[0]
    found = embedding.perceptual_distances(x)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(found), 0, atol=1e-6)
    assert found[0, 2] < 1e-6 < found[0, 1]
