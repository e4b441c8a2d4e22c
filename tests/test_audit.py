"""The audit on a random tiny model: equal work for all methods, and scoring of planted copies."""

import jax
import numpy as np
import pytest

from dmsec_jax import audit
from dmsec_jax.data.images import ImageSet


def image_set(pictures, prefix):
    names = tuple(f"{prefix}{i}" for i in range(len(pictures)))
    blank = (None,) * len(pictures)
    return ImageSet(images=pictures, names=names, sha256=names, captions=blank, notes=())


def noise(count, seed):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def subject(tiny_pipeline):
    tuned = jax.tree.map(lambda leaf: leaf * 1.05, tiny_pipeline.params["unet"])
    return audit.Subject(tiny_pipeline, {**tiny_pipeline.params, "unet": tuned}, "a red dog")


@pytest.mark.parametrize("name", audit.METHODS)
def test_methods_spend_the_same_evaluations(subject, name):
    drawn = audit.generate(jax.random.key(0), subject, name, evaluations=4, num_steps=2, batch_size=4)
    assert drawn.drawn * audit.METHODS[name].evaluations == 4
    assert drawn.images.shape == (drawn.drawn - drawn.broken, 16, 16, 3)


def test_weight_one_of_every_method_is_plain_sampling(subject):
    draw = lambda name: audit.generate(
        jax.random.key(0), subject, name, evaluations=4, num_steps=2, batch_size=4, w=1.0, k=0.0
    ).images[:2]
    for name in ("finextract", "finextract-caption", "cfg", "lora-scale"):
        np.testing.assert_allclose(draw(name), draw("plain"), atol=1e-4, err_msg=name)


def test_guidance_that_explodes_is_an_error(subject):
    with pytest.raises(ValueError, match="guidance must be weak enough"):
        audit.generate(jax.random.key(0), subject, "finextract", evaluations=2, num_steps=2, w=1e38)


def test_unknown_method_is_named(subject):
    with pytest.raises(ValueError, match="method must be one of finextract"):
        audit.generate(jax.random.key(0), subject, "magic", evaluations=2)


def test_planted_copies_are_found_and_hold_outs_are_not():
    members, holdouts = noise(10, 0), noise(10, 1)
    rng = np.random.default_rng(2)
    copies = np.repeat(members, 6, axis=0)
    drawn = np.clip(copies + 0.05 * rng.standard_normal(copies.shape), -1, 1).astype(np.float32)
    judge = audit.calibrated(image_set(members, "m"), image_set(holdouts, "h"), noise(20, 3), 0.01)
    found = audit.judge("plain", audit.Generated(drawn, len(drawn), 0), judge, count=10)
    assert len(found.extracted) == 10
    assert (found.matches.score >= judge.threshold.value).all()
    assert found.holdout_matches.score.max() < 0.5 * found.matches.score.min()
    assert found.clustered.rates[judge.threshold.value].value == 1
    assert found.base_similarity.max() < 0.5 * found.matches.score.min()


def test_carlini_keeps_only_large_groups():
    members = noise(10, 0)
    drawn = np.concatenate([np.repeat(members[:2], 6, axis=0), noise(20, 5)])
    judge = audit.calibrated(image_set(members, "m"), None, noise(20, 3), 0.01)
    found = audit.judge("carlini", audit.Generated(drawn, len(drawn), 0), judge, count=2)
    assert sorted(found.sizes) == [6, 6]


def test_one_picture_leans_on_the_base_model():
    judge = audit.calibrated(image_set(noise(1, 0), "m"), None, noise(20, 3), 0.01)
    assert judge.threshold.pairs == 20
    assert "base model" in judge.threshold.source
